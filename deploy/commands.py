"""The commands for clusters and finished runs."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipelines.config.data import check_path
from pipelines.config.schema import ConfigError
from pipelines.terminal import Debug, RunDir, Terminal, reporting

if TYPE_CHECKING:
    from deploy.cluster import Cluster

app = typer.Typer()
job = typer.Typer(help="A submitted job: its state, its log, its end.", no_args_is_help=True)
app.add_typer(job, name="job")
Address = Annotated[
    str,
    typer.Option(
        metavar="URL",
        help="The cluster's job server. Its token: RAY_AUTH_MODE=token, "
        "RAY_AUTH_TOKEN=... (environment).",
    ),
]
JobId = Annotated[str, typer.Argument(metavar="JOB_ID")]


@app.command()
def gate(
    run_dir: RunDir,
    require: Annotated[
        list[str] | None,
        typer.Option(
            metavar="CONDITION",
            help="A score's limit, such as after.forget.probability<=0.2; repeatable.",
        ),
    ] = None,
    verdict: Annotated[
        list[str] | None,
        typer.Option(
            metavar="VERDICT", help="A verdict that may pass; repeatable. [indistinguishable]"
        ),
    ] = None,
    debug: Debug = False,
) -> None:
    """Refuse a run whose verdict or scores miss what is required: exit code 3, one reason a line.

    Without options only the verdict counts: it must be "indistinguishable". What `verify`
    refuses, or finds changed, does not pass.
    """
    with reporting(debug) as terminal:
        from deploy.gate import parse_requirement, reasons_to_refuse
        from pipelines.report.page import RUN_FILES
        from pipelines.storage.output import open_output
        from pipelines.storage.verify import compare

        requirements = [parse_requirement(text) for text in require or ()]
        output = open_output(run_dir, "RUN_DIR")
        with output.local_copy(*RUN_FILES) as folder:
            reasons = reasons_to_refuse(folder, requirements, verdict or ["indistinguishable"])
        reasons += compare(output).differences
        for reason in reasons:
            terminal.say(reason)
        if reasons:
            raise typer.Exit(3)
        terminal.say(f"Passed: {run_dir}")


@app.command()
def serve(
    run_dir: RunDir,
    host: Annotated[
        str, typer.Option(help="The address to listen on; anybody who reaches it can ask.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer, at most.")] = 512,
    max_queue: Annotated[
        int, typer.Option(min=0, help="Requests that wait while one is answered, at most.")
    ] = 32,
    max_body_bytes: Annotated[int, typer.Option(min=1, help="Size of a request, at most.")] = 65536,
    gpus: Annotated[float, typer.Option(min=0, help="GPUs for the model; 0 answers on a CPU.")] = 0,
    debug: Debug = False,
) -> None:
    """Serve a run's merged model with Ray Serve: POST /v1/completions as OpenAI's, GET /healthz."""
    with reporting(debug) as terminal:
        if "://" in run_dir:
            raise ConfigError(f"RUN_DIR: found '{run_dir}', allowed: a folder with a copy of it")
        check_path(run_dir, "RUN_DIR")
        try:
            from deploy.serve import Settings
            from deploy.server import serve_run
        except ImportError as error:
            raise ConfigError(
                f"serve: {error}; allowed: ray-unlearn installed with its extra, cluster"
            ) from None
        settings = Settings(
            run_dir=str(Path(run_dir).resolve()), gpus=gpus, max_tokens=max_tokens,
            max_queue=max_queue, max_body_bytes=max_body_bytes,
        )  # fmt: skip
        try:
            serve_run(settings, host, port, terminal)
        except KeyboardInterrupt:
            terminal.say("Stopped.")
            raise typer.Exit(130) from None


@app.command()
def submit(
    command: Annotated[list[str], typer.Argument(metavar="-- COMMAND CONFIG [KEY=VALUE]...")],
    address: Address,
    follow: Annotated[
        bool,
        typer.Option(
            "--follow/--no-wait", help="Show the log to the end, or only print the job's id."
        ),
    ] = True,
    env_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Variables for the job, NAME=value a line: keys, passwords."
        ),
    ] = None,
    install: Annotated[
        bool,
        typer.Option(
            help="Install the pinned packages on the nodes, or take what their image has."
        ),
    ] = True,
    debug: Debug = False,
) -> None:
    """Run a command in a cluster, as a Ray job: submit --address URL -- run CONFIG ...

    Ships this installation's code and the configuration; paths in it are the cluster's. Exit code:
    the job's.
    """
    with reporting(debug) as terminal:
        from deploy.cluster import Cluster
        from deploy.submit import plan_job

        plan = plan_job(command, env_file, install=install)
        cluster = Cluster(address)
        job_id = cluster.submit(plan)
        if not follow:
            typer.echo(job_id)
            return
        terminal.say(f"Job: {job_id}")
        _follow(cluster, job_id, terminal)


@job.command()
def status(job_id: JobId, address: Address, debug: Debug = False) -> None:
    """Print PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED."""
    with reporting(debug):
        from deploy.cluster import Cluster

        typer.echo(str(Cluster(address).info(job_id).status))


@job.command()
def logs(
    job_id: JobId,
    address: Address,
    follow: Annotated[
        bool, typer.Option("--follow", help="On to the job's end; the exit code is the job's.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Print a job's log."""
    with reporting(debug) as terminal:
        from deploy.cluster import Cluster

        cluster = Cluster(address)
        if follow:
            _follow(cluster, job_id, terminal)
        else:
            typer.echo(cluster.logs(job_id), nl=False)


@job.command()
def stop(job_id: JobId, address: Address, debug: Debug = False) -> None:
    """Stop a job and wait for its end. The same submission goes on from the last resume point."""
    with reporting(debug) as terminal:
        from deploy.cluster import Cluster

        was_running = Cluster(address).stop(job_id)
        state = "stopped" if was_running else "had ended before"
        terminal.say(f"{job_id}: {state}")


def _follow(cluster: "Cluster", job_id: str, terminal: Terminal) -> None:
    """Print a job's log to its end, and exit with its code."""
    from deploy.cluster import exit_code

    try:
        info = cluster.follow(job_id, lambda text: typer.echo(text, nl=False))
    except KeyboardInterrupt:
        stop_command = f"ray-unlearn job stop --address {cluster.address} {job_id}"
        terminal.say(f"The job goes on. To stop it: {stop_command}")
        raise typer.Exit(130) from None
    code = exit_code(info)
    # A job that never ran has no log that says why.
    if code and info.driver_exit_code is None:
        reason = " ".join(str(info.message).split())[:2000]
        terminal.say(f"{job_id}: {info.status}: {reason}")
    raise typer.Exit(code)
