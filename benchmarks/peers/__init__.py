"""Other people's quantizers beside ours: what `benchmarks/bench_peers.py` runs, and how its record is shown.

registry       the rows, who takes part in them with which options, and who cannot and why
environments   a virtual environment for each peer
contract       what a peer's script gets and gives; the scripts are with_<peer>.py, run in those environments
measure        texts, the dense model, and one evaluation for everyone
page           the record as tables and as a figure
"""
