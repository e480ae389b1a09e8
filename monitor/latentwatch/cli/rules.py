"""`latentwatch rules`: the alert rules and Alertmanager's templates, with links that lead where you publish things."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "Write the alert rules and Alertmanager's sample, with links to your runbook, Grafana and live page."
EPILOG = """example:  latentwatch rules --out rules --page https://latentwatch.example.org"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Where links lead, and the folder."""
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="made where it is not there")
    parser.add_argument(
        "--runbook",
        metavar="URL",
        default="dashboards/runbook.md",
        help="where you publish dashboards/runbook.md; default: its path in the repository",
    )
    parser.add_argument("--grafana", metavar="URL", default="", help="of Grafana; default: links are paths of it")
    parser.add_argument(
        "--page",
        metavar="URL",
        default="",
        help="of the live page; default: http:// and the address at which Prometheus scrapes the collector",
    )
    parser.add_argument(
        "--unseen-by-design",
        type=float,
        default=0.95,
        metavar="SHARE",
        help="share of a model's tokens that a KV connector may leave unseen without a ticket; default %(default)s",
    )


def run(args: argparse.Namespace) -> int:
    """Write every file, and say what to do with them."""
    from latentwatch.errors import ConfigRefused, RefusalReason
    from latentwatch.export import dashboards

    for option in ("runbook", "grafana", "page"):
        url = getattr(args, option)
        default = "dashboards/runbook.md" if option == "runbook" else ""
        if url != default and not url.startswith(("http://", "https://")):
            raise ConfigRefused(
                f"--{option} {url}",
                found="it is no absolute address",
                instead="Begin it with https://, so that a link in a notification leads there.",
                reason=RefusalReason.CONFIG_VALUE,
            )
    if not 0 < args.unseen_by_design <= 1:
        raise ConfigRefused(
            f"--unseen-by-design {args.unseen_by_design:g}",
            found="a share is above 0 and at most 1",
            instead="Give for example 0.95.",
            reason=RefusalReason.CONFIG_VALUE,
        )
    links = dashboards.Links(args.runbook, args.grafana, args.page, args.unseen_by_design)
    folder = dashboards.folder()
    args.out.mkdir(parents=True, exist_ok=True)
    written = []
    for path in sorted((folder / "rules").glob("*.yaml")):
        (args.out / path.name).write_text(dashboards.linked(path.read_text("utf-8"), links), encoding="utf-8")
        written.append(path.name)
    for name in ("alertmanager.yml", "alertmanager.tmpl"):
        (args.out / name).write_text((folder / name).read_text("utf-8"), encoding="utf-8")
        written.append(name)
    print(f"wrote {', '.join(written)} to {args.out}")
    return 0
