"""Multiple-choice benchmarks as questions with four options: readers, subjects and worked examples."""
