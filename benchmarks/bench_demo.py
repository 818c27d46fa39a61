"""The README's table: the main job on the embedded model, recorded under benchmarks/results as "demo"."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile

from recorded import ROOT, save


def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        command = [sys.executable, "-m", "fewbits", "demo", "--json", "--out", f"{directory}/demo"]
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    record = json.loads(done.stdout)
    record["environment"]["command"] = "fewbits demo --json"
    print(save("demo", record))


if __name__ == "__main__":
    main()
