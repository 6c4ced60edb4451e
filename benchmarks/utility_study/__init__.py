"""The parts of `benchmarks/utility.py`. No file here is a command."""
