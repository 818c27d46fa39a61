"""Which format each layer gets: what every choice costs, and the best choices within a number of bits.

candidates.py   the formats to choose from, and which layers must agree
sensitivity.py  what a format costs a group of layers, in nats per token of the whole model
measurements.py what was measured, on disk, good for any budget
allocate.py     the choice: an integer programme
plan.py         a choice on disk, layer by layer
explain.py      why each group got what it got
auto.py         which composition of steps, within a time

Nothing here reads or runs a model: the pipeline does (pipeline/planning.py, pipeline/auto.py).
"""
