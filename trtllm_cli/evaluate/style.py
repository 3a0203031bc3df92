"""The style sheet of report pages: system fonts, two data colours that also differ in lightness, light and dark."""

STYLE = """
:root { color-scheme: light dark; --page: #f7f7f5; --card: #ffffff; --ink: #1c1c1a; --soft: #5f5e58; --rule: #e2e1dc;
  --one: #2a66c9; --two: #c8701a; --mark: #8a8880; }
@media (prefers-color-scheme: dark) { :root { --page: #151514; --card: #1e1e1c; --ink: #eceae4; --soft: #a3a199;
  --rule: #34332f; --one: #6ea3f5; --two: #e39a4f; --mark: #8a8880; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.55 system-ui, sans-serif; }
main { max-width: 860px; margin: 0 auto; padding: 40px 20px 64px; }
h1 { font-size: 30px; line-height: 1.2; margin: 0 0 6px; overflow-wrap: anywhere; }
h2 { font-size: 19px; margin: 0 0 12px; }
figure + h2, .scroll + h2 { margin-top: 28px; }
h3 { font-size: 15px; margin: 20px 0 8px; color: var(--soft); }
.kind { margin: 0; font-size: 13px; color: var(--soft); }
.facts { margin: 0 0 20px; color: var(--soft); }
section { background: var(--card); border: 1px solid var(--rule); border-radius: 8px;
  padding: 22px 24px; margin: 16px 0; }
.summary { font-size: 18px; }
.summary p { margin: 0 0 8px; } .summary p:last-child { margin: 0; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; }
.tile { background: var(--card); border: 1px solid var(--rule); border-radius: 8px; padding: 14px 16px;
  min-width: 0; }
.tile span { display: block; overflow-wrap: anywhere; }
.tile .label, .tile .sub { font-size: 13px; color: var(--soft); }
.tile .value { font-size: 26px; line-height: 1.3; font-variant-numeric: tabular-nums; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; min-width: 60%; font-size: 14px; margin: 0 0 12px;
  font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 6px 24px 6px 0; border-bottom: 1px solid var(--rule); vertical-align: top;
  overflow-wrap: break-word; }
th { font-weight: 600; color: var(--soft); } tbody tr:last-child td { border-bottom: 0; }
tbody td:first-child { white-space: nowrap; }
figure { margin: 12px 0 20px; } figcaption { font-size: 14px; color: var(--soft); margin-top: 4px; }
svg { display: block; width: 100%; min-width: 560px; height: auto; }
svg text { font: 12px system-ui, sans-serif; fill: var(--soft); } svg .note { fill: var(--ink); }
.grid { stroke: var(--rule); stroke-width: 1; } .axis { stroke: var(--mark); stroke-width: 1; }
.mark { stroke: var(--mark); stroke-width: 1; stroke-dasharray: 3 3; }
.whisker { stroke: var(--ink); stroke-width: 1.5; fill: none; }
.line { fill: none; stroke-width: 2; } .line.one { stroke: var(--one); } .line.two { stroke: var(--two); }
circle.one, rect.one { fill: var(--one); } circle.two, rect.two { fill: var(--two); }
.legend { margin: 0 0 4px; font-size: 14px; } .legend span { margin-right: 18px; white-space: nowrap; }
.key { display: inline-block; width: 14px; height: 3px; margin: 0 6px 4px 0; }
.key.one { background: var(--one); } .key.two { background: var(--two); }
.lineage, .lineage ul { list-style: none; margin: 0; padding: 0; }
.lineage ul { margin: 8px 0 0 8px; padding-left: 16px; border-left: 2px solid var(--rule); }
code { font: 13px ui-monospace, monospace; } .id { color: var(--soft); }
.options { font-size: 13px; color: var(--soft); overflow-wrap: anywhere; }
summary { cursor: pointer; font-size: 14px; color: var(--soft); }
"""
