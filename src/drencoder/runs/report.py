"""This module writes one self-contained HTML page from a run folder. It reads nothing else and needs no torch."""

import html
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from drencoder.errors import ArtifactError
from drencoder.privacy.ledger import Ledger
from drencoder.privacy.site_epsilons import UNITS
from drencoder.reading import cut, read_text
from drencoder.runs.audit_words import AUDIT_FILE, bound_cell, short_checks
from drencoder.runs.certificate import file_digests, lost_sentences
from drencoder.runs.plots import plot_rounds, svg_text
from drencoder.runs.run_folder import RunFolder

_STYLE = """
body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#1b1f24}
table{border-collapse:collapse;margin:1rem 0}td,th{border-bottom:1px solid #d0d7de;padding:.3rem .8rem;text-align:left}
td.n{text-align:right;font-variant-numeric:tabular-nums}h1{font-size:1.6rem}h2{font-size:1.2rem;margin-top:2rem}
.red{color:#b00020;font-weight:600}.dim{color:#57606a}svg{max-width:100%;height:auto}
"""


_FIGURE = "<svg></svg>\n"


def write_report(path: Path) -> Path:
    """Writes RUN/report.html from the certificate and the metrics, and returns its path.

    Raises:
      ArtifactError: the run has no certificate yet.
    """
    folder = RunFolder.open(path)
    folder.write(folder.report, _make_page(folder, plot=True).encode())
    return folder.report


def page_without_figure(folder: RunFolder) -> str:
    """The page that the run's other files give, but for its figure, which another version of matplotlib draws otherwise.

    Raises:
      ArtifactError: the run has no certificate yet, or a file is damaged.
    """
    return _make_page(folder, plot=False)


def without_figure(page: str) -> str:
    """A page without its figure, as `page_without_figure` has it."""
    return re.sub("<svg.*?</svg>", _FIGURE.strip(), page, count=1, flags=re.DOTALL)


def _make_page(folder: RunFolder, *, plot: bool) -> str:
    certificate = folder.read_json(folder.certificate)
    try:
        samples = folder.read_json(folder.samples) if folder.samples.exists() else None
        metrics = [row for row in folder.read_metrics() if row.get("loss") is not None]
        figure = _render_plot(metrics) if plot or not metrics else _FIGURE
        page = _render_page(certificate, figure, read_text(folder.recipe), samples, _read_audit(folder))
        page.encode()
    except (LookupError, TypeError, ValueError, AttributeError, StopIteration) as error:
        raise ArtifactError(
            f"{folder.certificate} or another file of {folder.path} is damaged ({type(error).__name__}): restore it from a copy."
        ) from None
    return page


def remake_report(path: Path) -> Path:
    """`write_report` for a finished run: the ledger closes again, with the digest of the new page.

    Raises:
      ArtifactError: the run is not finished, or another file is not the one that it left.
    """
    folder = RunFolder.open(path)
    with Ledger.open(folder.ledger) as ledger:
        closed = ledger.records[-1]
        if closed["kind"] != "closed":
            raise ArtifactError(f"{path} is unfinished: finish it with drencoder run --resume {path}.")
        name, bound, actual = folder.report.name, closed["files"], file_digests(folder)
        if other := sorted(key for key in (bound.keys() | actual.keys()) - {name} if bound.get(key) != actual.get(key)):
            raise ArtifactError(
                f"{cut(other[0])} of {path} was changed after the run closed its ledger: drencoder verify says more."
            )
        write_report(path)
        digests = file_digests(folder)
        if digests != bound:
            ledger.record_closed(closed["rounds"], digests)
    return folder.report


def _read_audit(folder: RunFolder) -> dict[str, Any] | None:
    """What `drencoder audit` left in the folder; None without one."""
    path = folder.path / AUDIT_FILE
    return folder.read_json(path) if path.exists() else None


def _render_page(
    certificate: Mapping[str, Any],
    figure: str,
    recipe: str,
    samples: Mapping[str, Any] | None,
    audit: Mapping[str, Any] | None,
) -> str:
    title = f"drencoder run {html.escape(certificate['name'])}"
    mark = "" if certificate["private"] else " class='red'"
    sent = certificate["bytes"]
    parts = [
        f"<!doctype html><html lang='en'><meta charset='utf-8'><title>{title}</title><style>{_STYLE}</style>",
        f"<h1>{title}</h1><p{mark}>{html.escape(certificate['statement'])}</p>",
        "<h2>Result</h2>",
        f"<p>{html.escape(certificate['verdict'])}</p>",
        _render_results(certificate["results"], certificate["uniform_loss"]),
        f"<p class='dim'>{html.escape(certificate['evaluation_rests_on'])}</p>",
        *([f"<p class='red'>{html.escape(certificate['twin'])}</p>"] if "twin" in certificate else []),
        *_render_samples(samples),
        "<h2>Epsilon for each observer</h2>",
        _render_observers(certificate),
        *_render_audit(audit),
        *_render_sites(certificate["sites"]),
        *_render_units(certificate.get("unit_terms"), certificate["relation"]),
        "<h2>Uploads</h2>",
        f"<p>{sent['uploaded']:,} bytes ({html.escape(sent['counted'])}); plain LoRA would send {sent['plain_lora']:,}, "
        f"{sent['plain_lora'] / max(1, sent['uploaded']):.1f} times more.</p>",
        "<h2>Rounds</h2>",
        figure,
        *(f"<p>{html.escape(sentence)}</p>" for sentence in lost_sentences(certificate["slots_without_result"])),
        "<h2>Encoder and stage 1</h2>",
        _render_facts(
            certificate["encoder"]
            | certificate["stage1"]
            | {"adapter_start": certificate.get("adapter_start", "peft")}
            | {f"clip_{key}": value for key, value in certificate.get("clip", {}).items()}
        ),
        "<h2>Recipe</h2>",
        f"<pre>{html.escape(recipe)}</pre>",
    ]
    return "\n".join(parts) + "\n"


def _render_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(map(_render_cell, row)) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def _render_cell(text: str) -> str:
    """Returns a table cell: numbers stand on the right, words on the left."""
    kind = " class=n" if text[:1].isdigit() or text[:1] == "-" else ""
    return f"<td{kind}>{html.escape(text)}</td>"


def _render_results(results: Mapping[str, Any], uniform_loss: float) -> str:
    benchmarks = list(next(iter(results.values()))["accuracy"])
    header = ["model", "held-out loss", *(f"{name} accuracy" for name in benchmarks)]
    rows = [["guessing uniformly", f"{uniform_loss:.3f}", *["-"] * len(benchmarks)]]
    rows += [
        [name, _estimate_text(row["loss"]), *(_estimate_text(row["accuracy"][key]) for key in benchmarks)]
        for name, row in results.items()
    ]
    return _render_table(header, rows)


def _estimate_text(row: Mapping[str, float] | None) -> str:
    if row is None:
        return "-"
    return f"{row['value']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"


def _render_audit(audit: Mapping[str, Any] | None) -> list[str]:
    """Returns what an audit measured; a hint where there was none."""
    if audit is None:
        return ["<p class='dim'>This run was not audited: drencoder audit RUN measures what an attacker can tell.</p>"]
    names = list(dict.fromkeys(name for view in audit["views"] for name in view["bounds"]))
    titles = [f"{name.replace('_', ' ')} bound, 95 % (99.9 %)" for name in names]
    rows = [
        [
            view["observer"],
            view["sees"],
            f"{view['canary']}, {'replaced' if view['relation'] == 'replace_one' else 'in or out'}",
            f"{view['promised']:.2f}",
            *(bound_cell(view["bounds"].get(name)) for name in names),
        ]
        for view in audit["views"]
    ]
    checks = [["holds" if passed else "FAILS", name, found] for passed, name, found in short_checks(audit["checks"])]
    mark = " class='red'" if audit["failures"] else ""
    return [
        "<h2>Audit: what an attacker can really tell</h2>",
        f"<p{mark}>{html.escape(audit['verdict'])}</p><p>{html.escape(audit['sentence'])}</p>",
        *(f"<p class='red'>{html.escape(failure)}</p>" for failure in audit["failures"]),
        _render_table(["observer", "sees", "canaries", "promised", *titles], rows),
        _render_table(["", "what must hold", "what was found"], checks),
    ]


def _render_sites(sites: Sequence[Mapping[str, str]]) -> list[str]:
    """Returns what the sites of a federation said about themselves; nothing without sites."""
    header = ["site", "clients", "text", "owners"]
    rows = [[site["name"], site["clients"], site["data"], site["owners"]] for site in sites]
    return ["<h2>Sites</h2>", _render_table(header, rows)] if sites else []


def _render_units(terms: Mapping[str, Any] | None, relation: str) -> list[str]:
    """Returns what holds of sites whose own units are protected, site by site; nothing where the unit is a client."""
    if terms is None:
        return []
    public = terms["assumed_public"]
    header = ["sites", "slots", "server", "other sites", "public"]
    rows = [
        [", ".join(map(str, row["sites"])), str(row["slots"])]
        + [_epsilon_text(row["epsilon"][relation][name]) for name in ("server", "clients", "public")]
        for row in terms["by_site"]
    ]
    assumed = (
        f"Taken to be public: {terms['sites']} sites, {public['units_per_site']} units a site, sampling rate "
        f"{public['sampling_rate']:g}. {terms['private']} {terms['amplification']} Not protected: {terms['not_protected']}"
    )
    return [
        "<h2>Epsilon of each site's units</h2>",
        f"<p>{html.escape(assumed)}</p>",
        _render_table(header, rows),
        f"<p class='dim'>PLD, {relation.replace('_', '/')}; a slot counts for every site that was asked in it.</p>",
    ]


def _render_samples(samples: Mapping[str, Any] | None) -> list[str]:
    """Returns what base and adapted model answered to public prompts; nothing where they were not asked."""
    if samples is None or not samples["rows"]:
        return []
    header = ["prompt", "base model", "this run"]
    rows = [[row["prompt"], row["base"], row["adapted"]] for row in samples["rows"]]
    about = f"<p class='dim'>The prompts are {html.escape(samples['prompts_are'])}; no client's text is among them.</p>"
    return ["<h2>Answers</h2>", _render_table(header, rows), about]


def _render_observers(certificate: Mapping[str, Any]) -> str:
    delta = certificate["delta"]
    rows = [
        [
            key,
            _epsilon_text(row["by_relation"]["add_remove"]["epsilon_pld"]),
            _epsilon_text(row["by_relation"]["replace_one"]["epsilon_pld"]),
            _epsilon_text(row["by_relation"]["add_remove"]["epsilon_rdp"]),
            row["assumption"],
        ]
        for key, row in certificate["observers"].items()
    ]
    header = ["observer", "PLD add/remove", "PLD replace-one", "RDP", "what it rests on"]
    unit = html.escape(UNITS.get(certificate["unit"], certificate["unit"]))
    return _render_table(header, rows) + f"<p class='dim'>delta = {delta:g}; the unit is {unit}.</p>"


def _epsilon_text(value: float | str | None) -> str:
    if value is None:
        return "-"
    return "no guarantee" if math.isinf(float(value)) else f"{float(value):.4f}"


def _render_facts(facts: Mapping[str, Any]) -> str:
    return _render_table(
        ["fact", "value"],
        [[key, f"{value:.6g}" if isinstance(value, float) else str(value)] for key, value in facts.items()],
    )


def _render_plot(rows: Sequence[Mapping[str, Any]]) -> str:
    """Returns held-out loss and accuracy per round, as inline SVG."""
    if not rows:
        return "<p>No loss was measured between rounds.</p>"
    return svg_text(plot_rounds(rows))
