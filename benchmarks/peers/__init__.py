"""Other people's quantizers beside ours: what `benchmarks/bench_peers.py` runs, and how its record is shown.

registry       the rows, who takes part in them with which options, and who cannot and why
environments   a virtual environment for each peer
contract       what a peer's script gets and gives; the scripts are with_<peer>.py, run in those environments
measure        texts, the dense model, and one evaluation for everyone
page           the record as tables and as a figure

With 8 bits on both sides peers run their models themselves (`benchmarks/bench_w8a8_peers.py`):

w8a8           who takes part with which options; the scripts are w8a8_<peer>.py
running        what such a script gives back
w8a8_page      the record as a table
"""
