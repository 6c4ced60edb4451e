"""The parts of `benchmarks/speed.py`. No file here is a command of its own but `worker.py` and `in_process.py`, which speed.py starts."""
