"""The page's looks and its few lines of behaviour: both inline, so that the page is one file."""

CSS = """
:root { color-scheme: light dark;
  --paper: #fbfaf7; --card: #ffffff; --ink: #1d2126; --soft: #667079; --line: #e3e0d8; --hatch: #d9d5cb;
  --vision: #e08a1e; --language: #4a63d8; --target: #12805c; --target-bg: #d3f2e3; --muted: #b3372f; --muted-bg: #fbe3e0;
  --visual-bg: #fdebcf; --visual: #8a5208; --bad: #b3372f; --seg-l: 60%; --seg-s: 62%; --link: #3549b3; }
@media (prefers-color-scheme: dark) { :root {
  --paper: #14171a; --card: #1c2024; --ink: #e7e9ea; --soft: #97a1a9; --line: #30363b; --hatch: #3a4147;
  --vision: #e59a3c; --language: #7f93f5; --target: #7fe0b6; --target-bg: #123e2f; --muted: #f19a92; --muted-bg: #4b1f1c;
  --visual-bg: #47330f; --visual: #f1c583; --bad: #f1776d; --seg-l: 52%; --seg-s: 50%; --link: #9fb0ff; } }
* { box-sizing: border-box; }
html { scroll-behavior: smooth; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, "Segoe UI", "Noto Sans", sans-serif;
  font-variant-numeric: tabular-nums; }
main { max-width: 1240px; margin: 0 auto; padding: 36px 28px 90px; }
h1 { font-size: 28px; line-height: 1.2; margin: 0 0 4px; letter-spacing: -.015em; font-weight: 650; }
h2 { font-size: 18px; margin: 44px 0 4px; letter-spacing: -.005em; }
p { margin: 0 0 12px; max-width: 78ch; } .soft { color: var(--soft); }
code, .mono { font-family: ui-monospace, "SF Mono", "DejaVu Sans Mono", monospace; font-size: .88em; }
a { color: var(--link); }
.numbers { display: grid; grid-template-columns: repeat(auto-fit, minmax(128px, 1fr)); gap: 1px; margin: 22px 0 0;
  background: var(--line);
  border: 1px solid var(--line); border-radius: 10px; overflow: hidden; }
.numbers div { background: var(--card); padding: 11px 14px 10px; }
.numbers b { display: block; font-size: 21px; font-weight: 620; letter-spacing: -.015em; line-height: 1.3; }
.numbers span { color: var(--soft); font-size: 12.5px; display: block; line-height: 1.35; } .numbers .bad b { color: var(--bad); }
.settings { margin-top: 10px; font-size: 13px; color: var(--soft); } .settings span { margin-right: 18px; white-space: nowrap; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 18px; font-size: 13px; color: var(--soft); margin: 6px 0 10px; align-items: center; }
.legend i { display: inline-block; width: 12px; height: 12px; border-radius: 3px; margin-right: 6px; vertical-align: -1px; }
.hue { background: hsl(var(--h) var(--seg-s) var(--seg-l)); }
.vision { background: var(--vision); } .language { background: var(--language); }
.idle, .pad { background: repeating-linear-gradient(135deg, var(--hatch) 0 1.5px, transparent 1.5px 6px); }
table { border-collapse: collapse; font-size: 14px; } td, th { padding: 4px 18px 4px 0; text-align: right; white-space: nowrap; }
th { font-weight: 500; color: var(--soft); font-size: 12.5px; border-bottom: 1px solid var(--line); }
td:first-child, th:first-child { text-align: left; } td.wide { width: 280px; }
.share { position: relative; height: 12px; background: var(--line); border-radius: 3px; }
.share > i { display: block; height: 100%; border-radius: 3px; }
.share > b { position: absolute; top: -4px; bottom: -4px; width: 2px; background: var(--ink); margin-left: -1px; }
.row { display: grid; grid-template-columns: 116px minmax(0, 1fr) 116px; gap: 12px; align-items: center; font-size: 13px; margin: 3px 0; }
.row > :last-child { color: var(--soft); white-space: nowrap; } .row > :first-child { white-space: nowrap; }
.work { display: flex; height: 16px; width: 100%; } .work > div { display: flex; margin-right: 2px; min-width: 0; }
.work > div:hover { filter: brightness(1.12); } .work i { height: 100%; } .work i:first-child { border-radius: 3px 0 0 3px; }
.work i:last-child { border-radius: 0 3px 3px 0; } .work .idle { flex: 1; border-radius: 3px; margin: 0; }
.bar { display: flex; height: 20px; width: 100%; border-radius: 4px; overflow: hidden; background: var(--card); }
.seg { display: block; height: 100%; min-width: 1px; background: hsl(var(--h) var(--seg-s) var(--seg-l));
  box-shadow: inset -1px 0 0 var(--paper); }
.seg:hover, .seg.on { filter: brightness(1.15) saturate(1.3); }
.seg.lost { background: repeating-linear-gradient(45deg, var(--bad) 0 4px, var(--card) 4px 8px); }
:root[data-colour=source] .seg { --h: var(--hs); } :root[data-colour=task] .seg { --h: var(--ht); }
.by { display: none; } :root:not([data-colour]) .by-sample, :root[data-colour=sample] .by-sample, :root[data-colour=source] .by-source,
:root[data-colour=task] .by-task { display: flex; }
.choice { display: inline-flex; border: 1px solid var(--line); border-radius: 7px; overflow: hidden; font-size: 13px; margin-left: 6px; }
.choice button { font: inherit; color: var(--soft); background: var(--card); border: 0; padding: 2px 12px; cursor: pointer; }
.choice button + button { border-left: 1px solid var(--line); }
.choice button.on { color: var(--ink); font-weight: 600; background: var(--line); }
.pack { background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 18px 20px 6px; margin: 16px 0 26px; }
.pack h3 { margin: 0 0 2px; font-size: 16px; } .pack .top { display: grid; grid-template-columns: minmax(0, 1fr) 196px; gap: 28px; }
.pack .top .bar { height: 28px; margin: 10px 0 8px; }
.mask { text-align: center; font-size: 12px; color: var(--soft); line-height: 1.35; }
.mask img { width: 172px; height: 172px; display: block; margin: 0 auto 4px; border: 1px solid var(--line); border-radius: 4px;
  image-rendering: pixelated; }
.sample { border-top: 1px solid var(--line); padding: 16px 0 18px; scroll-margin-top: 12px; content-visibility: auto;
  contain-intrinsic-size: auto 220px; }
.sample:target { box-shadow: inset 3px 0 0 var(--link); margin-left: -20px; padding-left: 20px; }
.sample header { display: flex; flex-wrap: wrap; gap: 2px 16px; align-items: baseline; font-size: 13px; color: var(--soft);
  margin-bottom: 10px; }
.sample header b { color: var(--ink); font-size: 14.5px; font-weight: 620; }
.sample header i { width: 13px; height: 13px; border-radius: 4px;
  align-self: center; margin-right: -8px; }
.problem { color: var(--bad); border: 1px solid var(--bad); border-radius: 7px; padding: 6px 12px; font-size: 13.5px; margin: 0 0 10px; }
.what { display: flex; gap: 24px; align-items: flex-start; }
.pictures { display: flex; flex-direction: column; gap: 14px; flex: 0 0 auto; max-width: 560px; }
.picture { font-size: 12px; color: var(--soft); line-height: 1.4; max-width: 560px; }
.views { margin-bottom: 4px; display: flex; gap: 14px; flex-wrap: wrap; align-items: flex-start; }
.views > div { min-width: 0; } .views small { display: block; font-size: 11.5px; margin-bottom: 3px; } .over { display: block; }
.over image { image-rendering: auto; } .small image, .small img { image-rendering: pixelated; }
.tiles { display: grid; gap: 3px; } .tiles img { display: block; width: 100%; border-radius: 2px; }
.unread { display: grid; place-items: center;
  border: 1px dashed var(--bad); color: var(--bad); border-radius: 4px; }
.tokens { flex: 1 1 320px; min-width: 0; font-size: 14px; line-height: 1.75; white-space: pre-wrap; overflow-wrap: anywhere; }
.tokens s { text-decoration: none; } .tokens .context s { color: var(--soft); }
.tokens .target s { color: var(--target); background: var(--target-bg); font-weight: 550; }
.tokens .muted s { color: var(--muted); background: var(--muted-bg); text-decoration: line-through; }
.tokens s { padding: 2px 0; box-shadow: inset -1px 0 0 color-mix(in srgb, var(--ink) 10%, transparent); }
.tokens s:hover { outline: 1px solid currentColor; }
.tokens .visual { color: var(--visual); background: var(--visual-bg); border-radius: 5px; padding: 2px 8px; margin: 0 3px;
  font-size: 12.5px; white-space: nowrap; }
.key { border-radius: 4px; padding: 1px 7px; } .key.target { color: var(--target); background: var(--target-bg); }
.key.muted { color: var(--muted);
  background: var(--muted-bg); text-decoration: line-through; } .key.visual { color: var(--visual); background: var(--visual-bg); }
.objects { display: flex; flex-wrap: wrap; gap: 4px 14px; font-size: 13px; }
#tip { position: fixed; z-index: 9; pointer-events: none; background: var(--ink); color: var(--paper); font-size: 12.5px;
  line-height: 1.45; padding: 7px 11px;
  border-radius: 7px; white-space: pre-line; max-width: 380px; display: none; box-shadow: 0 4px 18px #0004; }
.note { color: var(--soft); font-size: 13px; margin: 6px 0; }
.labels text { font-size: .6px; text-anchor: middle; fill: #fff; stroke: #000; stroke-width: .09px; paint-order: stroke; }
footer { margin-top: 50px; color: var(--soft); font-size: 12.5px; border-top: 1px solid var(--line); padding-top: 12px; }
@media (max-width: 820px) { .what, .pack .top { display: block; } .tokens { margin-top: 12px; }
.row { grid-template-columns: 84px minmax(0, 1fr) 84px; }
  main { padding: 20px 14px 60px; } .pack { padding: 14px 14px 4px; } .mask { text-align: left; } .mask img { margin: 8px 0 4px; } }
@media print { .pack { break-inside: avoid-page; } }
"""

SCRIPT = """
"use strict";
const root = document.documentElement, tip = document.getElementById("tip");
let errors = 0;
root.dataset.errors = "0";
addEventListener("error", () => { root.dataset.errors = String(++errors); });
addEventListener("mousemove", (event) => {
  const at = event.target.closest ? event.target.closest("[data-tip]") : null;
  if (!at) { tip.style.display = "none"; return; }
  tip.textContent = at.dataset.tip;
  tip.style.display = "block";
  const box = tip.getBoundingClientRect();
  tip.style.left = Math.max(6, Math.min(event.clientX + 14, innerWidth - box.width - 8)) + "px";
  tip.style.top = (event.clientY + 20 + box.height > innerHeight ? event.clientY - box.height - 12 : event.clientY + 20) + "px";
});
for (const button of document.querySelectorAll("[data-choose]")) button.addEventListener("click", () => {
  root.dataset.colour = button.dataset.choose;
  for (const other of document.querySelectorAll("[data-choose]")) other.classList.toggle("on", other === button);
});
root.dataset.ready = "1";
"""
