"""The part of the command line that deals with clusters and finished artifacts."""

from pathlib import Path
from typing import Annotated, Any

import typer

from pipelines.config.schema import ConfigError
from pipelines.terminal import Action, RunDir, Terminal, guarded

app = typer.Typer()
job = typer.Typer(help="A submitted job: its state, its log, its end.", no_args_is_help=True)
app.add_typer(job, name="job")
Address = Annotated[
    str,
    typer.Option(
        metavar="URL",
        help="The cluster's job server. Its token: RAY_AUTH_MODE=token, RAY_AUTH_TOKEN=... (environment).",
    ),
]
JobId = Annotated[str, typer.Argument(metavar="JOB_ID")]


@app.command()
@guarded()
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
        typer.Option(metavar="VERDICT", help="A verdict that may pass; repeatable. [forgotten]"),
    ] = None,
) -> Action:
    """Refuse a run whose verdict or scores miss what is required: exit code 3, one reason a line.

    Without options only the verdict counts: it must be the page's "forgotten". Digests are the command verify's.
    """

    def action(terminal: Terminal) -> None:
        from deploy.gate import parse_requirement, reasons_to_refuse
        from pipelines.report.page import RUN_FILES
        from pipelines.storage.output import open_output

        requirements = [parse_requirement(text) for text in require or ()]
        with open_output(run_dir, "RUN_DIR").local_copy(*RUN_FILES) as folder:
            reasons = reasons_to_refuse(folder, requirements, verdict or ["forgotten"])
        for reason in reasons:
            terminal.say(reason)
        if reasons:
            raise typer.Exit(3)
        terminal.say(f"Passed: {run_dir}")

    return action


@app.command()
@guarded()
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
) -> Action:
    """Serve a run's merged model with Ray Serve: POST /v1/completions as OpenAI's, GET /healthz."""

    def action(terminal: Terminal) -> None:
        if "://" in run_dir:
            raise ConfigError(f"RUN_DIR: found '{run_dir}', allowed: a folder with a copy of it")
        try:
            from deploy.serve import Settings
            from deploy.server import serve_run
        except ImportError as error:
            raise ConfigError(
                f"serve: {error}; allowed: ray-unlearn installed with its extra, cluster"
            ) from None
        limits = {
            "max_tokens": max_tokens,
            "max_queue": max_queue,
            "max_body_bytes": max_body_bytes,
        }
        settings = Settings(run_dir=str(Path(run_dir).resolve()), gpus=gpus, **limits)
        try:
            serve_run(settings, host, port, terminal)
        except KeyboardInterrupt:
            terminal.say("Stopped.")
            raise typer.Exit(130) from None

    return action


@app.command()
@guarded()
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
) -> Action:
    """Run a command in a cluster, as a Ray job: submit --address URL -- run CONFIG ...

    Ships this installation's code and the configuration; paths in it are the cluster's. Exit code: the job's.
    """

    def action(terminal: Terminal) -> None:
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

    return action


@job.command()
@guarded()
def status(job_id: JobId, address: Address) -> Action:
    """Print PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED."""

    def action(_: Terminal) -> None:
        from deploy.cluster import Cluster

        typer.echo(str(Cluster(address).info(job_id).status))

    return action


@job.command()
@guarded()
def logs(
    job_id: JobId,
    address: Address,
    follow: Annotated[
        bool, typer.Option("--follow", help="On to the job's end; the exit code is the job's.")
    ] = False,
) -> Action:
    """Print a job's log."""

    def action(terminal: Terminal) -> None:
        from deploy.cluster import Cluster

        cluster = Cluster(address)
        if follow:
            _follow(cluster, job_id, terminal)
        else:
            typer.echo(cluster.logs(job_id), nl=False)

    return action


@job.command()
@guarded()
def stop(job_id: JobId, address: Address) -> Action:
    """Stop a job and wait for its end. The same submission goes on from the last resume point."""

    def action(terminal: Terminal) -> None:
        from deploy.cluster import Cluster

        terminal.say(
            f"{job_id}: {'stopped' if Cluster(address).stop(job_id) else 'had ended before'}"
        )

    return action


def _follow(cluster: Any, job_id: str, terminal: Terminal) -> None:
    """Show a job's log to its end, and end with its exit code."""
    from deploy.cluster import exit_code

    try:
        info = cluster.follow(job_id, lambda text: typer.echo(text, nl=False))
    except KeyboardInterrupt:
        terminal.say(
            f"The job goes on. To stop it: ray-unlearn job stop --address {cluster.address} {job_id}"
        )
        raise typer.Exit(130) from None
    code = exit_code(info)
    if code and info.driver_exit_code is None:  # it never ran, so the log does not say why
        terminal.say(f"{job_id}: {info.status}: {' '.join(str(info.message).split())[:2000]}")
    raise typer.Exit(code)
