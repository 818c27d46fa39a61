"""One page that shows what a quantization did: reads the certificate, computes nothing."""

from fewbits.report.html import write_report

__all__ = ["write_report"]
