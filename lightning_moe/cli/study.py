"""``study``: several routing methods, each tuned alike, trained with several seeds, as one page."""

from __future__ import annotations

from lightning_moe.cli.arguments import add_shared, command_parser, home_path, stopped

DESCRIPTION = """\
Train the methods of a study's file (see docs/study.md): first one run per method and tuned value, then one run per
method and seed with the best value. Each run is the real ``fit`` in a process of its own. Stop it at any time: the same
command continues. At the end, or at any time with --report, it writes a page with tables and figures."""


def run(command: str, args: list[str]) -> None:
    """Run what is missing of the study, and write its page.

    Raises:
        UserError: bad input, before the first run; or failed runs, after the others.
        SystemExit: code 2 on unknown options, 0 after ``--help``.
    """
    parser = command_parser(command, DESCRIPTION)
    parser.add_argument("file", type=home_path, help="the study's file, such as sweeps/study.yaml")
    for flag in ("--workers", "--config", "--name"):
        add_shared(parser, flag)
    parser.add_argument("--report", action="store_true", help="train nothing; write the page of the finished runs")
    parser.add_argument(
        "--page", type=home_path, metavar="FILE",
        help="Markdown file to write between its markers (default: results.md in the study's folder)",
    )  # fmt: skip
    options = parser.parse_args(args)

    from lightning_moe.study.main import run_study
    from lightning_moe.study.spec import read_study

    try:
        study = read_study(options.file, options.config, options.name)
        run_study(study, options.workers, options.report, options.page)
    except KeyboardInterrupt as stop:
        raise stopped(stop) from None
