"""The report's style sheet: light or dark as the reader's system asks, for phones and wide screens."""

STYLE = (
    """
:root {
  color-scheme: light dark;
  --page: #faf9f6; --card: #ffffff; --ink: #1d2126; --quiet: #59626d; --line: #e2dfd8; --grid: #ebe8e2;
  --c0: #65707d; --c1: #1763ab; --c2: #b34a08; --c3: #157347; --c4: #86398c; --c5: #826400;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #14171a; --card: #1b1f23; --ink: #e5e7ea; --quiet: #9ca6b1; --line: #31373e; --grid: #292f35;
    --c0: #a2acb8; --c1: #6fb3f2; --c2: #f29b60; --c3: #5cc493; --c4: #d592db; --c5: #d9bc55;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; text-size-adjust: 100%; }
body {
  margin: 0; background: var(--page); color: var(--ink); overflow-wrap: break-word;
  font: 1rem/1.6 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "Noto Sans", Arial, sans-serif;
}
main { max-width: 66rem; margin: 0 auto; padding: 3.5rem 1.5rem 4rem; }
h1 { font-size: 2rem; line-height: 1.2; font-weight: 650; letter-spacing: -0.015em; margin: 0 0 0.75rem;
  text-wrap: balance; }
h2 { font-size: 1.3rem; line-height: 1.3; font-weight: 650; letter-spacing: -0.01em; margin: 3.5rem 0 0.5rem; }
h3 { font-size: 0.95rem; line-height: 1.4; font-weight: 650; margin: 0; }
p { max-width: 44rem; margin: 0 0 1rem; text-wrap: pretty; }
.summary { font-size: 1.125rem; }
.warning { border-left: 4px solid var(--c2); background: var(--card); padding: 0.8rem 1rem; font-weight: 600; }
.note, figcaption p { color: var(--quiet); font-size: 0.875rem; line-height: 1.5; margin: 0.5rem 0 0; }
nav { margin-top: 1.5rem; font-size: 0.9rem; display: flex; flex-wrap: wrap; gap: 0.25rem 1.25rem; }
a { color: var(--c1); text-underline-offset: 0.2em; text-decoration-thickness: 1px; }
.highlights { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: 1rem;
  margin: 2rem 0 0; }
.highlights div { border-top: 2px solid var(--ink); padding-top: 0.6rem; }
.highlights dt { color: var(--quiet); font-size: 0.85rem; line-height: 1.35; }
.highlights dd { margin: 0.15rem 0 0; font-size: 1.75rem; line-height: 1.2; font-weight: 600;
  font-variant-numeric: tabular-nums; }
.highlights dd small { display: block; font-size: 0.85rem; font-weight: 400; color: var(--quiet); line-height: 1.4; }
.scroll { overflow-x: auto; margin: 1.25rem 0 0; }
table { border-collapse: collapse; width: 100%; font-size: 0.92rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 650; padding-bottom: 0.4rem; }
th, td { padding: 0.6rem 0.65rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
th:last-child, td:last-child { padding-right: 0; }
thead th { color: var(--quiet); font-weight: 500; font-size: 0.84rem; border-bottom: 1px solid var(--ink);
  vertical-align: bottom; }
thead th { white-space: normal; min-width: 4rem; line-height: 1.3; }
tbody th { font-weight: 600; }
td .interval { display: inline-grid; grid-template-columns: auto auto; align-items: center; gap: 0 0.6rem; }
td .interval small { grid-column: 1; color: var(--quiet); font-size: 0.8rem; line-height: 1.2; }
td .interval svg { grid-column: 2; grid-row: 1 / span 2; width: 5.5rem; height: 1.27rem; display: block; }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 26rem), 1fr)); gap: 1.25rem;
  margin: 1.25rem 0 0; }
figure { margin: 0; background: var(--card); border: 1px solid var(--line); border-radius: 0.6rem;
  padding: 1rem 1.1rem; min-width: 0; }
figure .chart { display: block; width: 100%; height: auto; margin-top: 0.75rem; }
.sample { margin: 1.25rem 0 0; background: var(--card); border: 1px solid var(--line); border-radius: 0.6rem;
  overflow: hidden; }
.prompt { padding: 0.9rem 1.1rem; border-bottom: 1px solid var(--line); white-space: pre-wrap; font-weight: 600; }
.answers { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 16rem), 1fr)); gap: 1px;
  background: var(--line); }
.answer { background: var(--card); padding: 0.9rem 1.1rem; display: flex; flex-direction: column; gap: 0.5rem;
  min-width: 0; }
.answer h4 { margin: 0; font-size: 0.84rem; font-weight: 650; display: flex; align-items: center; gap: 0.5rem; }
.answer h4::before { content: ""; width: 0.6rem; height: 0.6rem; border-radius: 50%; background: var(--quiet);
  flex: none; }
.answer.c0 h4::before { background: var(--c0); } .answer.c1 h4::before { background: var(--c1); }
.answer.c2 h4::before { background: var(--c2); } .answer.c3 h4::before { background: var(--c3); }
.answer.c4 h4::before { background: var(--c4); } .answer.c5 h4::before { background: var(--c5); }
.answer p { margin: 0; white-space: pre-wrap; line-height: 1.5; font-size: 0.95rem; flex: 1;
  unicode-bidi: plaintext; }
.answer .scores { color: var(--quiet); font-size: 0.84rem; font-variant-numeric: tabular-nums; flex: none; }
.empty { color: var(--quiet); font-style: italic; }
details { margin: 1.25rem 0 0; } summary { cursor: pointer; color: var(--c1); }
.provenance { display: grid; grid-template-columns: minmax(8rem, max-content) 1fr; gap: 0.35rem 1.5rem;
  margin: 1.25rem 0 0; font-size: 0.9rem; }
.provenance dt { color: var(--quiet); } .provenance dd { margin: 0; min-width: 0; white-space: pre-wrap; }
svg { font-family: inherit; } svg text { fill: var(--ink); }
svg .tick { fill: var(--quiet); font-size: 12px; font-variant-numeric: tabular-nums; }
svg .label { fill: var(--quiet); font-size: 12.5px; }
svg .name { font-size: 13px; font-weight: 600; } svg .value { font-size: 13.5px; font-weight: 600;
  font-variant-numeric: tabular-nums; }
svg .halo { paint-order: stroke; stroke: var(--card); stroke-width: 4px; stroke-linejoin: round; }
svg .grid { stroke: var(--grid); stroke-width: 1; } svg .axis { stroke: var(--quiet); stroke-width: 1; }
svg .reference { stroke: var(--quiet); stroke-width: 1; stroke-dasharray: 4 3; }
svg .line { fill: none; stroke-width: 2; stroke-linejoin: round; stroke-linecap: round; } svg .line.thin {
  stroke-width: 1.5; }
svg .line.faint { stroke-width: 1; stroke-opacity: 0.45; }
svg .track { stroke: var(--line); stroke-width: 2; stroke-linecap: round; }
svg .area { stroke: none; fill-opacity: 0.16; } svg .whisker { stroke-width: 2.5; stroke-linecap: round; }
"""
    + "".join(
        f"svg .line.c{i}, svg .whisker.c{i} {{ stroke: var(--c{i}); }} "
        f"svg .fill.c{i}, svg .area.c{i}, svg .name.c{i} {{ fill: var(--c{i}); }}\n"
        for i in range(6)
    )
    + """
@media (max-width: 40rem) {
  /* Charts shrink with the screen; their letters must not. */
  svg .tick, svg .label, svg .name, svg .value { font-size: 14.5px; }
  main { padding: 2rem 1rem 3rem; } h1 { font-size: 1.6rem; }
  .highlights { grid-template-columns: repeat(2, 1fr); } .provenance { grid-template-columns: 1fr; gap: 0; }
  .provenance dd { margin-bottom: 0.6rem; } figure { padding: 0.8rem; }
  /* No screen that narrow has room for a table: each row is a card, each cell a line with its column's name. */
  .scroll { overflow: visible; } table, caption, tbody, tr { display: block; }
  thead { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
  tbody tr { background: var(--card); border: 1px solid var(--line); border-radius: 0.6rem; padding: 0.7rem 0.8rem;
    margin: 0 0 0.8rem; }
  tbody th, tbody td { display: flex; justify-content: space-between; align-items: center; gap: 1rem; border: 0;
    padding: 0.3rem 0; white-space: normal; }
  tbody th { font-size: 1rem; padding-bottom: 0.4rem; }
  tbody td::before { content: attr(data-label); color: var(--quiet); text-align: left; line-height: 1.3; }
  td .interval { flex: none; }
}
@media print { body { background: none; } figure, .sample { break-inside: avoid; } nav { display: none; } }
"""
)
