"""The entrypoint of a job inside the cluster, with the user's variables for all of its processes.

The variables are in a file among the job's code, because Ray's job server and dashboard show a
runtime environment's `env_vars` and an entrypoint. The job that `deploy.submit` plans runs
`python -m deploy.job`.
"""

import json
import os

from deploy.submit import CODE, ENVIRONMENT_FILE


def load_environment() -> None:
    """Set the variables of the job's environment file. Ray calls it in every worker of the job."""
    os.environ.update(json.loads((CODE / ENVIRONMENT_FILE).read_text(encoding="utf-8")))


if __name__ == "__main__":
    if (CODE / ENVIRONMENT_FILE).exists():
        load_environment()
    # Imported now, as libraries read the environment when they are imported.
    from pipelines.__main__ import main

    main()
