"""The order of a run's stages and what it leaves behind: build, run, stage 1, checkpoints, run folder, verify, report.

A new artefact of a run is added here. The rooms below know nothing of folders."""
