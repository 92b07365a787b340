"""Processes that tests end at once, as a lost machine would."""

from contextlib import suppress

import psutil


def kill_tree(process: psutil.Process) -> None:
    """End a process with all that it started; a node asked nicely would take half a minute."""
    for one in [*process.children(recursive=True), process]:
        with suppress(psutil.NoSuchProcess):
            one.kill()


def train_workers(process: psutil.Process) -> list[psutil.Process]:
    """Ray Train's workers among the processes that this one started; others may train on this machine."""
    found = []
    for one in process.children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if one.name().startswith("ray::RayTrainWorker"):
                found.append(one)
    return found
