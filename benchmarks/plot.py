"""Draws benchmarks/results/*.json and writes their tables into benchmarks/README.md, between its markers.

python benchmarks/plot.py
"""

import json
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
import scaling
import throughput

HERE = Path(__file__).parent
BEGIN, END = "<!-- results: written by plot.py -->", "<!-- end of results -->"
_COLORS = {"guide": "#9a9a9a", "trl": "#d08c3f", "trl_changed": "#e5b97f", "ours": "#2f6fab"}
_AXES = {
    "num_rows": "rows in the data set",
    "responses": "responses per prompt",
    "length_factor": "mean tokens of a row",
    "batch_size": "rows of a micro-batch",
}


def best_of_each(results: list[dict]) -> list[dict]:
    """Returns the fastest row of every name, and of TRL the one as shipped and the fastest of either kind."""
    best: dict[str, dict] = {}
    for row in results:
        # Of TRL's many settings a reader wants two: what it does unasked, and the best that it can do.
        name = {"trl": "TRL's best setting", "trl_changed": "TRL's best, loss replaced"}.get(row["family"], row["name"])
        if name not in best or row["tokens_per_second"] > best[name]["tokens_per_second"]:
            best[name] = {**row, "name": name}
        if "as shipped" in row["name"]:
            best[row["name"]] = row
    return sorted(best.values(), key=lambda row: row["tokens_per_second"])


def draw_throughput(content: dict, path: Path) -> None:
    """Draws real tokens a second of each competitor at its best micro-batch, with its ratio to the guide's loop."""
    rows = best_of_each(content["results"])
    base = throughput.guide_rate(content)
    figure, axes = plt.subplots(figsize=(8, 0.55 * len(rows) + 1.6), layout="constrained")
    rates = [row["tokens_per_second"] for row in rows]
    bars = axes.barh(
        [f"{row['name']} ({row['batch_size']} rows)" for row in rows],
        rates,
        color=[_COLORS[row["family"]] for row in rows],
    )
    axes.bar_label(bars, [f"{rate:,.0f}  ({rate / base:.2f}x)" for rate in rates], padding=4)
    axes.set_xlim(0, max(rates) * 1.32)
    axes.set_xlabel("real tokens per second (ratio to the guide's loop with 4 rows)")
    axes.set_title(
        f"{content['model']} model, {content['dtype']}, {content['device']}, "
        f"{content['responses_per_prompt']} response(s) per prompt"
    )
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def draw_scaling(content: dict, path: Path) -> None:
    """Draws a panel for each axis: tokens a second above, resident memory below."""
    figure, panels = plt.subplots(2, len(_AXES), figsize=(15, 6.5), layout="constrained", sharex="col")
    for column, (axis, label) in enumerate(_AXES.items()):
        chosen = [row for row in content["results"] if row["axis"] == axis]
        x_of = "mean_tokens" if axis == "length_factor" else axis
        for layout in dict.fromkeys(row["layout"] for row in chosen):
            rows = [row for row in chosen if row["layout"] == layout]
            x = [row[x_of] for row in rows]
            panels[0, column].plot(x, [row["tokens_per_second"] for row in rows], "o-", label=layout)
            panels[1, column].plot(x, [row["peak_resident_bytes"] / 2**30 for row in rows], "o-", label=layout)
        panels[1, column].set_xlabel(label)
        if chosen:
            panels[0, column].legend()
        for panel in panels[:, column]:
            panel.set_xscale("log")
            panel.set_ylim(bottom=0)
            panel.grid(alpha=0.3)
    panels[0, 0].set_ylabel("real tokens per second")
    panels[1, 0].set_ylabel("peak resident memory, GiB")
    figure.savefig(path, dpi=150)
    plt.close(figure)


# The others bring their table along.
KINDS = {"throughput": (draw_throughput, throughput.table), "scaling": (draw_scaling, scaling.table)}


def sections(folder: Path) -> list[str]:
    """Draws every report of a kind that has a plot. Returns each one's section for the README."""
    result = []
    for path in sorted(folder.glob("*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        body = content.get("table")
        if content["benchmark"] in KINDS:
            draw, table = KINDS[content["benchmark"]]
            draw(content, path.with_suffix(".png"))
            body = f"{table(content)}\n\n![{path.stem}](results/{path.stem}.png)"
        about, versions = content["machine"], content["machine"]["versions"]
        numbers = ", ".join(f"{name} {number}" for name, number in versions.items() if number)
        result.append(
            f"### {path.stem}\n\n{body}\n\n"
            f"{about['gpu'] or about['processor']}, {about['cores']} cores; Python {about['python']}, {numbers}."
        )
    return result


def fill_in(readme: Path, parts: list[str]) -> None:
    """Puts the sections between the markers of the README."""
    before, _, rest = readme.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    body = "\n\n".join(parts) or "Nothing has been measured."
    readme.write_text(f"{before}{BEGIN}\n\n{body}\n\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    fill_in(HERE / "README.md", sections(HERE / "results"))
