"""The page of one step: a single HTML file without a network address in it."""

from __future__ import annotations

from collections import Counter

from megavlm.data.inspect.markup import pack_bar, percent, picture, plural, sample_facts, sample_id, text, tip, tokens, work_bar
from megavlm.data.inspect.pictures import hue
from megavlm.data.inspect.style import CSS, SCRIPT
from megavlm.data.inspect.views import Cost, PackView, SampleView, Share, StepView
from megavlm.topology.table import human_count

MAX_RANK_ROWS = 32
MAX_PACK_BARS = 128
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


def render(view: StepView) -> str:
    """The whole page."""
    title = f"step {view.step} of {view.stage} - {view.recipe}"
    body = [_header(view), _mixture(view), _work(view), _packs(view), *_details(view)]
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}"><title>{text(title)}</title>'
        f"<style>{CSS}</style></head><body><main>{''.join(body)}"
        f"<footer>Made by <code>megavlm data inspect</code> from the plan and the data that training gets.</footer></main>"
        f'<div id="tip"></div><script>{SCRIPT}</script></body></html>\n'
    )


# --------------------------------------------------------------------------------------------------- the step as a whole


def _header(view: StepView) -> str:
    where = (
        f"{view.recipe} · {view.objective} · steps 0 to {view.num_steps - 1} · {plural(view.dp_size, 'data-parallel rank')}"
        f" · {plural(view.num_microbatches, 'microbatch')} each"
    )
    cells = "".join(
        f'<div class="{"bad" if is_bad else ""}"><b>{text(value)}</b><span>{text(what)}</span></div>'
        for value, what, is_bad in _numbers(view)
    )
    settings = "".join(f"<span>{text(name)} <code>{text(value)}</code></span>" for name, value in view.settings.items())
    return (
        f'<h1>Step {view.step} of stage {text(view.stage)}</h1><p class="soft">{text(where)}</p>'
        f'<div class="numbers">{cells}</div><div class="settings">{settings}</div>'
    )


def _numbers(view: StepView) -> list[tuple[str, str, bool]]:
    """(figure, what it is, whether it is bad news)."""
    packs, samples = view.packs, [s for pack in view.packs for s in pack.samples]
    used, capacity, targets = (sum(values) for values in zip(*((p.used, p.capacity, p.targets) for p in packs), strict=True))
    cost = sum((p.cost for p in packs), Cost(0.0, 0.0))
    unit = "pictures" if view.classifies else "tokens"
    numbers = [
        (percent(used / capacity, 2), f"fill: {used:,} of {capacity:,} {unit}", False),
        (f"{len(samples):,}", f"samples in {plural(len(packs), 'pack')}", False),
        (f"{targets:,}", "labelled patches" if view.classifies else f"targets, {percent(targets / used)} of the tokens", False),
    ]
    if view.objective != "text":
        numbers.append((f"{sum(s.tiles for s in samples):,}", f"tiles, {sum(s.patches for s in samples):,} patches", False))
    numbers.append((percent(view.idle, 2), "idle: waiting for the busiest rank, by FLOPs", False))
    numbers.append((percent(cost.vision_share), f"vision's share of {human_count(cost.total)} FLOPs", False))
    if (wait := view.statistics.get("oldest_wait_samples")) is not None:
        numbers.append((f"{wait:,.0f}", "samples drawn since the one that waits longest", False))
    if read := [s for pack in view.detailed for s in pack.samples]:
        bad = sum(s.problem is not None for s in read)
        numbers.append((str(bad), f"unreadable of {plural(len(read), 'sample')} read for this page", bad > 0))
    return numbers


def _mixture(view: StepView) -> str:
    in_step, drawn = (sum(values) or 1 for values in zip(*((s.in_step, s.drawn) for s in view.shares), strict=True))
    longest = max(max(s.target, s.in_step / in_step) for s in view.shares) or 1.0
    rows = "".join(_share(share, number, in_step, drawn, longest) for number, share in enumerate(view.shares))
    heads = ("source", "", "target", "this step", "drawn so far", "samples", "epochs", "in the source")
    return (
        f"<h2>Mixture</h2><table><tr>{''.join(f'<th>{head}</th>' for head in heads)}</tr>{rows}</table>"
        '<p class="note">Bar: share of this step\'s samples. Mark: what the recipe asks for at this step. The mixture keeps to its shares'
        " in what is drawn; a step takes of that what fills its packs.</p>"
    )


def _share(share: Share, number: int, in_step: int, drawn: int, longest: float) -> str:
    realised = share.in_step / in_step
    told = tip([f"target {percent(share.target, 2)}", f"this step {percent(realised, 2)}"])
    cells = (
        percent(share.target),
        percent(realised),
        percent(share.drawn / drawn, 2),
        f"{share.in_step:,}",
        f"{share.drawn / share.rows:.3f}",
        f"{share.rows:,}",
    )
    return (
        f'<tr><td>{text(share.source)}</td><td class="wide"><div class="share" {told}>'
        f'<i class="hue" style="--h:{hue(number)};width:{100 * realised / longest:.3f}%"></i>'
        f'<b style="left:{100 * share.target / longest:.3f}%"></b></div></td>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>'
    )


def _work(view: StepView) -> str:
    costs, fill = view.rank_costs(), view.rank_fill()
    totals = [sum(cost.total for cost in rank) for rank in costs]
    busiest = max(totals)
    shown = sorted(range(len(costs)), key=lambda r: -totals[r])
    if len(shown) > MAX_RANK_ROWS:
        shown = shown[: MAX_RANK_ROWS // 2] + shown[-MAX_RANK_ROWS // 2 :]
    rows = []
    for rank in sorted(shown):
        told = tip([f"packs {percent(fill[rank], 2)} full", f"{human_count(totals[rank])} FLOPs"])
        end = f"{percent(1 - totals[rank] / busiest, 2)} idle" if totals[rank] < busiest else "busiest"
        begin = f"<div {told}>rank {rank}, {percent(fill[rank])}</div>"
        rows.append(f'<div class="row rank">{begin}{work_bar(costs[rank], busiest)}<div>{end}</div></div>')
    half = MAX_RANK_ROWS // 2
    left = (
        f'<p class="note">Shown are the {half} busiest and the {half} idlest of {len(costs)} ranks.</p>' if len(costs) > len(shown) else ""
    )
    return (
        '<h2>Work</h2><div class="legend"><span><i class="vision"></i>vision: encoder and projector</span>'
        '<span><i class="language"></i>language model</span><span><i class="idle"></i>idle</span>'
        f"<span>A bar a microbatch, as long as its FLOPs. With the rank: fill of its packs.</span></div>{''.join(rows)}{left}"
    )


def _packs(view: StepView) -> str:
    rows = []
    for pack in view.packs[:MAX_PACK_BARS]:
        name = f"rank {pack.rank}, mb {pack.microbatch}" + (f".{pack.place}" if view.has_groups else "")
        linked = f'<a href="#{_pack_id(pack)}">{name}</a>' if pack.is_detailed else name
        bar = pack_bar(pack, view.sources, view.tasks, view.classifies)
        end = f"{percent(pack.fill, 2)}, {len(pack.samples)}"
        rows.append(f'<div class="row overview"><div>{linked}</div>{bar}<div>{end}</div></div>')
    counts = {
        "source": Counter(s.source for pack in view.packs for s in pack.samples),
        "task": Counter(s.task for pack in view.packs for s in pack.samples),
    }
    legends = "".join(
        f'<div class="legend by by-{kind}">'
        + "".join(f'<span><i class="hue" style="--h:{hue(i)}"></i>{text(n)} ({counts[kind][n]:,})</span>' for i, n in enumerate(names))
        + "</div>"
        for kind, names in (("source", view.sources), ("task", view.tasks))
    )
    buttons = "".join(
        f'<button type="button" data-choose="{name}"{" class=on" if name == "sample" else ""}>{name}</button>'
        for name in ("sample", "source", "task")
    )
    more = len(view.packs) - MAX_PACK_BARS
    left = f'<p class="note">{plural(more, "more pack")} not drawn.</p>' if more > 0 else ""
    return (
        f'<h2>Packs</h2><div class="legend"><span>A bar a pack, a colour a<span class="choice">{buttons}</span></span>'
        f'<span><i class="pad"></i>{"free places" if view.classifies else "padding"}</span><span>At the end: fill, samples.</span></div>'
        f"{legends}{''.join(rows)}{left}"
    )


# --------------------------------------------------------------------------------------------------- sample by sample


def _pack_id(pack: PackView) -> str:
    return f"p{pack.rank}-{pack.microbatch}-{pack.place}"


def _details(view: StepView) -> list[str]:
    """Packs sample by sample, and how many are left out."""
    rest = len(view.packs) - len(view.detailed)
    left = f" {plural(rest, 'more pack')} of this step left out; <code>--packs {len(view.packs)}</code> shows all." if rest else ""
    count = f"{len(view.detailed)} of {plural(len(view.packs), 'pack')}" if rest else plural(len(view.packs), "pack")
    head = f'<h2>Sample by sample</h2><p class="soft" id="left-out">{count}.{left}</p>'
    if not view.detailed:
        return [head]
    keys = (
        '<span>coloured patches: their class; the rest is background</span><span><i class="pad"></i>free places</span>'
        if view.classifies
        else '<span><b class="key target">target</b> predicted, in the loss</span>'
        '<span><b class="key muted">muted</b> predicted, weight 0</span>'
        '<span>grey: context, read only</span><span><b class="key visual">n visual tokens</b> from pictures</span>'
        '<span><i class="pad"></i>padding</span>'
    )
    return [f'{head}<div class="legend">{keys}</div>', *(_pack(view, pack) for pack in view.detailed)]


def _pack(view: StepView, pack: PackView) -> str:
    place = f"Rank {pack.rank}, microbatch {pack.microbatch}" + (f", pack {pack.place}" if view.has_groups else "")
    unit = "pictures" if view.classifies else "tokens"
    facts = [
        f"{pack.used:,} of {pack.capacity:,} {unit} ({percent(pack.fill, 2)})",
        plural(len(pack.samples), "sample"),
        plural(pack.targets, "labelled patch" if view.classifies else "target"),
        *([f"{pack.patches:,} patches"] if pack.patches and not view.classifies else []),
        f"{human_count(pack.cost.total)} FLOPs, {percent(pack.cost.vision_share)} vision",
    ]
    mask = "Patches of a picture see each other." if view.classifies else "Rows: queries. Columns: keys, visual tokens lighter."
    samples = "".join(_sample(pack, number, sample, view.classifies) for number, sample in enumerate(pack.samples))
    return (
        f'<section class="pack" id="{_pack_id(pack)}"><div class="top"><div><h3>{place}</h3>'
        f'<div class="soft">{text(" · ".join(facts))}</div>{pack_bar(pack, view.sources, view.tasks, view.classifies)}</div>'
        f'<div class="mask"><img src="{pack.mask}" alt="attention mask" {tip(["attention mask", mask])}></div></div>{samples}</section>'
    )


def _sample(pack: PackView, number: int, sample: SampleView, classifies: bool) -> str:
    facts = "".join(f"<span>{text(fact)}</span>" for fact in sample_facts(sample, classifies))
    problem = ""
    if sample.problem is not None:
        problem = f'<div class="problem">Could not be read, so its loss weight is 0: {text(sample.problem)}</div>'
    pictures = "".join(picture(view) for view in sample.pictures)
    content = (f'<div class="pictures">{pictures}</div>' if pictures else "") + (
        f'<div class="tokens">{tokens(sample.runs)}</div>' if sample.runs else ""
    )
    return (
        f'<article class="sample" id="{sample_id(pack, number)}"><header><i class="hue" style="--h:{hue(number)}"></i>'
        f'<b {tip([sample.where])}>{text(sample.key)}</b>{facts}</header>{problem}<div class="what">{content}</div></article>'
    )
