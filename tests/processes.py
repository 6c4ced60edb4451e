"""Commands in real processes that need not import torch first: a fork server has done it, once for all tests."""

import multiprocessing
import os
import sys
from multiprocessing.context import ForkServerProcess

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["drencoder.cli.main", "drencoder.runs.run", "peft"])


def start_command(*arguments: str) -> ForkServerProcess:
    """`drencoder ARGUMENTS`, its output thrown away; `exitcode` after `join`."""
    process = SERVER.Process(target=_run, args=(arguments,))
    process.start()
    return process


def _run(arguments: tuple[str, ...]) -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    sys.argv = ["drencoder", *arguments]
    from drencoder.cli.main import main

    main()
