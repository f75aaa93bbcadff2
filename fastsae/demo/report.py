"""The demo's report: one self-contained HTML file, inline SVG, no script, no network."""

import html
import math
from pathlib import Path

_STYLE = """
:root { --ink:#1c2430; --soft:#5b6675; --line:#e3e7ee; --mark:#ffe28a }
body { font:15px/1.55 system-ui,-apple-system,"Segoe UI",sans-serif; color:var(--ink);
       max-width:1040px; margin:36px auto; padding:0 24px; }
h1 { font-size:28px; margin:0 0 4px } h2 { font-size:20px; margin:40px 0 8px }
p.lead, p.note { color:var(--soft); margin:4px 0 14px } p.note { font-size:13px }
table { border-collapse:collapse; width:100%; font-size:14px }
th { text-align:left; color:var(--soft); font-weight:600 }
th, td { padding:6px 10px 6px 0; border-bottom:1px solid var(--line); vertical-align:top }
td.number, th.number { text-align:right; font-variant-numeric:tabular-nums }
.words span { background:#eef3fc; border-radius:4px; padding:1px 6px; margin:0 4px 4px 0;
              display:inline-block }
.text { font-size:13px; color:var(--soft) } mark { background:var(--mark); color:var(--ink) }
.pair { display:grid; grid-template-columns:1fr 1fr; gap:18px; border-bottom:1px solid var(--line);
        padding:12px 0; font-size:14px } .pair h3 { grid-column:1/3; font-size:15px; margin:0 }
.pair small { display:block; color:var(--soft) } .yes { color:#137a3f } .no { color:#b3261e }
.tiles { display:flex; gap:16px; flex-wrap:wrap; margin:18px 0 }
.tile { border:1px solid var(--line); border-radius:8px; padding:12px 18px }
.tile b { font-size:24px; display:block }
svg text { font:12px system-ui,sans-serif; fill:var(--ink) }
"""


def write(result: dict, path: Path) -> None:
    """Write the report of a demo result (the content of demo.json) to `path`."""
    summary = result["summary"]
    tiles = [
        (f"{summary['topics_passed']} of {len(result['topics'])}", "topics rise at least 5-fold"),
        (f"×{summary['median_fold']:.1f}", "median rise of held-out words"),
        (f"×{summary['random_fold_mean']:.2f}", "random features, same norm"),
        (f"×{summary['perplexity_ratio_max']:.2f}", "largest perplexity ratio (limit 2)"),
        (f"{summary['seconds']:.0f} s", "for everything on this page"),
    ]
    blocks = "".join(f'<div class="tile"><b>{esc(a)}</b>{esc(b)}</div>' for a, b in tiles)
    sae, model = result["sae"], result["model"]
    parts = [
        f"<h1>fastsae: {esc(model['name'])}, explained and steered</h1>",
        f'<p class="lead">A sparse autoencoder with {sae["d_sae"]:,} features ({sae["k"]} active '
        f"per token) at {esc(sae['hook_name'])}; {esc(result['machine']['cpu'])}, "
        f"{result['machine']['threads']} threads, no GPU needed.</p>",
        f'<div class="tiles">{blocks}</div>',
        "<h2>What a feature means</h2>",
        '<p class="note">Left: the vocabulary words that tell most about the feature '
        "(mutual-information score, from the weights alone). Right: where it is most active in "
        "texts that the model wrote, which the explanation has never seen.</p>",
        _features(result["features"]),
        "<h2>How often features fire, and how strongly</h2>",
        histogram(result["histogram"]),
        "<h2>What steering does</h2>",
        '<p class="note">Features are found by searching the explanations for the topic\'s search '
        "words. Bars: how much more probable the topic's <i>held-out</i> words, which the search "
        "never saw, become at the same places of the same texts. Grey: the mean of "
        f"{len(result['topics'][0]['random_folds'])} draws of random features at the same norm, "
        "none of which keeps a search word of any topic. 'Writing': the same in the texts that the "
        "steered model writes itself.</p>",
        bars(result["topics"]),
        _table(result["topics"]),
        "<h2>Base and steered, same prompt and same random numbers</h2>",
        "".join(_pair(topic) for topic in result["topics"]),
        "<h2>Time</h2>",
        _times(result["timings_s"]),
        f'<p class="note">fastsae {esc(result["machine"]["fastsae"])}, torch '
        f"{esc(result['machine']['torch'])}, seed {result['seed']}, command: "
        f"<code>{esc(result['command'])}</code></p>",
    ]
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f"<title>fastsae demo</title><style>{_STYLE}</style></head><body>"
        + "\n".join(parts)
        + "</body></html>\n"
    )
    path.write_text(page, encoding="utf-8")


def esc(text: object) -> str:
    return html.escape(str(text))


def _features(features: list[dict]) -> str:
    rows = []
    for feature in features:
        words = "".join(f"<span>{esc(word)}</span>" for word in feature["words"])
        texts = "".join(
            f'<div class="text">{esc(t["before"])}<mark>{esc(t["token"])}</mark>{esc(t["after"])} '
            f"<b>{t['value']:.1f}</b></div>"
            for t in feature["texts"]
        )
        rows.append(
            f'<tr><td class="number">{feature["feature"]}</td>'
            f'<td class="words">{words}</td><td>{texts}</td></tr>'
        )
    head = (
        '<tr><th class="number">feature</th><th>explanation</th><th>strongest activations</th></tr>'
    )
    return f"<table>{head}{''.join(rows)}</table>"


def _table(topics: list[dict]) -> str:
    head = (
        "<tr><th>topic</th><th>searched</th><th>held-out words</th><th>features</th>"
        '<th class="number">rise</th><th class="number">random</th>'
        '<th class="number">writing</th><th class="number">perplexity</th><th>passes</th></tr>'
    )
    rows = "".join(
        f"<tr><td><b>{esc(t['name'])}</b></td><td>{esc(', '.join(t['search']))}</td>"
        f"<td>{esc(', '.join(t['held_out']))}</td>"
        f"<td>{esc(', '.join(str(f) for f in t['features']))}</td>"
        f'<td class="number">×{t["fold"]:.1f}</td><td class="number">×{t["random_fold"]:.2f}</td>'
        f'<td class="number">×{t["writing_fold"]:.1f}</td>'
        f'<td class="number">×{t["perplexity_ratio"]:.2f}</td>'
        f'<td class="{"yes" if t["passed"] else "no"}">{"yes" if t["passed"] else "no"}</td></tr>'
        for t in topics
    )
    return f"<table>{head}{rows}</table>"


def _pair(topic: dict) -> str:
    pair = topic["pair"]
    return (
        f'<div class="pair"><h3>{esc(topic["name"])}</h3>'
        f"<div><small>base</small><b>{esc(pair['prompt'])}</b>{esc(pair['base'])}</div>"
        f"<div><small>steered</small><b>{esc(pair['prompt'])}</b>{esc(pair['steered'])}</div></div>"
    )


def _times(timings: dict[str, float]) -> str:
    rows = "".join(
        f'<tr><td>{esc(step)}</td><td class="number">{seconds:.1f} s</td></tr>'
        for step, seconds in timings.items()
    )
    return f"<table>{rows}</table>"


def bars(topics: list[dict]) -> str:
    """Rise per topic on a logarithmic axis; random features beside it, a line at 5-fold."""
    left, width, height = 110, 860, 34
    top = max(10.0, *(t["fold"] for t in topics))
    low = min(0.5, *(t["fold"] for t in topics), *(t["random_fold"] for t in topics))
    low, top = math.log(max(low, 1e-3)), math.log(top * 1.15)

    def x(value: float) -> float:
        return left + (math.log(max(value, 1e-3)) - low) / (top - low) * (width - left - 60)

    out = [f'<svg viewBox="0 0 {width} {height * len(topics) + 34}" role="img">']
    for mark in (0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500):
        if low <= math.log(mark) <= top:
            color = "#137a3f" if mark == 5 else "#e3e7ee"
            out.append(
                f'<line x1="{x(mark):.1f}" x2="{x(mark):.1f}" y1="0" y2="{height * len(topics)}" '
                f'stroke="{color}"/><text x="{x(mark):.1f}" y="{height * len(topics) + 18}" '
                f'text-anchor="middle">×{mark:g}</text>'
            )
    for row, topic in enumerate(topics):
        y = row * height + 4
        out.append(
            f'<text x="{left - 10}" y="{y + 16}" text-anchor="end">{esc(topic["name"])}</text>'
        )
        for value, offset, tall, color in (
            (topic["fold"], 0, 15, "#2f6fde"),
            (topic["random_fold"], 17, 7, "#b9c2cf"),
        ):
            start, end = sorted((x(1.0), x(value)))
            out.append(
                f'<rect x="{start:.1f}" y="{y + offset}" width="{max(1.0, end - start):.1f}" '
                f'height="{tall}" rx="2" fill="{color}"/>'
            )
        end = max(x(topic["fold"]), x(1.0))
        out.append(f'<text x="{end + 6:.1f}" y="{y + 12}">×{topic["fold"]:.1f}</text>')
    return "".join(out) + "</svg>"


def histogram(data: dict) -> str:
    """Two histograms over features: how often one fires (log10 share) and its mean activation."""
    return (
        '<div style="display:grid;grid-template-columns:1fr 1fr;gap:24px">'
        + _histogram(data["frequency"], "log10 of the share of tokens on which a feature fires")
        + _histogram(data["activation"], "mean activation when it fires")
        + "</div>"
    )


def _histogram(data: dict, label: str) -> str:
    counts, edges = data["counts"], data["edges"]
    width, height = 480, 190
    step = (width - 20) / max(1, len(counts))
    peak = max(1, *counts)
    out = [f'<svg viewBox="0 0 {width} {height + 44}" role="img">']
    for i, count in enumerate(counts):
        tall = height * count / peak
        out.append(
            f'<rect x="{10 + i * step:.1f}" y="{height - tall + 4:.1f}" width="{step - 1.5:.1f}" '
            f'height="{tall:.1f}" fill="#2f6fde"><title>{count} features</title></rect>'
        )
    for i in range(0, len(edges), max(1, len(edges) // 5)):
        anchor = "start" if i == 0 else "middle"
        shown = f"{edges[i]:.0f}" if abs(edges[i]) >= 100 else f"{edges[i]:.2g}"
        out.append(
            f'<text x="{10 + i * step:.1f}" y="{height + 20}" text-anchor="{anchor}">{shown}</text>'
        )
    out.append(f'<text x="{width / 2}" y="{height + 40}" text-anchor="middle">{esc(label)}</text>')
    return "".join(out) + "</svg>"
