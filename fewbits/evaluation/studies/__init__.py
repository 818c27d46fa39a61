"""Studies: figures of the literature, measured again. Each computes one record and draws nothing.

A study is a function `study(..., on_progress) -> Record` in a module of its own; its page is a line in
`fewbits.report.study.PAGES` and its command one in `fewbits.cli.study`.
"""

from fewbits.core.registry import Registry
from fewbits.evaluation.studies.record import Record, record

STUDIES = Registry(
    "study",
    {
        "formats": "fewbits.evaluation.studies.formats:study",
        "model_formats": "fewbits.evaluation.studies.model_formats:study",
        "bits": "fewbits.evaluation.studies.bits:study",
        "outliers": "fewbits.evaluation.studies.outliers:study",
    },
)

__all__ = ["STUDIES", "Record", "record"]
