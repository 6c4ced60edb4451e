"""The parts of `benchmarks/real_text.py`: how much of an update a code holds, and the results page."""
