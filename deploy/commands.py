"""The part of the command line that deals with clusters and finished artifacts."""

from typing import Annotated

import typer

from pipelines.console import Debug, RunDir, Terminal, guarded

app = typer.Typer()


@app.command()
def gate(
    run_dir: RunDir,
    require: Annotated[
        list[str] | None,
        typer.Option(metavar="CONDITION", help="A score's limit, such as after.forget.probability<=0.2; repeatable."),
    ] = None,
    verdict: Annotated[
        list[str] | None, typer.Option(metavar="VERDICT", help="A verdict that may pass; repeatable. [forgotten]")
    ] = None,
    debug: Debug = False,
) -> None:
    """Refuse a run whose verdict or scores miss what is required: exit code 3, one reason a line.

    Without options only the verdict counts: it must be the page's "forgotten". Digests are the command verify's.
    """

    def action(terminal: Terminal) -> None:
        from deploy.gate import parse_requirement, reasons_to_refuse

        requirements = [parse_requirement(text) for text in require or ()]
        reasons = reasons_to_refuse(run_dir, requirements, verdict or ["forgotten"])
        for reason in reasons:
            terminal.say(reason)
        if reasons:
            raise typer.Exit(3)
        terminal.say(f"Passed: {run_dir}")

    guarded(action, debug=debug)
