"""Inside the cluster: the job's entrypoint, and what puts the user's variables into every process of the job.

The variables travel in a file among the job's code, because a runtime environment's `env_vars` and an entrypoint are
job metadata, which Ray's job server and dashboard show. `deploy.submit` has the job run `python -m deploy.job`.
"""

import json
import os

from deploy.submit import CODE, ENVIRONMENT_FILE


def load_environment() -> None:
    """Set the variables of the job's environment file; Ray calls it in every worker of the job."""
    os.environ.update(json.loads((CODE / ENVIRONMENT_FILE).read_text(encoding="utf-8")))


if __name__ == "__main__":
    if (CODE / ENVIRONMENT_FILE).exists():
        load_environment()
    from pipelines.__main__ import main  # what it imports reads the environment

    main()
