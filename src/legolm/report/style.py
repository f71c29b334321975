"""How all pages look, in light and in dark and on paper; `--b0` to `--b5` are the colours of blocks and variants.

All of them are letters' colours too: each has a contrast of at least 4.5 to what it stands on (WCAG 2.2, 1.4.3).
"""

LIGHT = (
    "--paper:#fff;--ink:#1b1e23;--soft:#5d6570;--grid:#dfe3e8;--wash:#f5f6f8;--bad:#b3401a;"
    "--b0:#0072b2;--b1:#b84d00;--b2:#007a58;--b3:#a8447f;--b4:#8a6200;--b5:#7a4fc0"
)
DARK = (
    "--paper:#14171c;--ink:#e8eaed;--soft:#9aa3af;--grid:#333a44;--wash:#1d2128;--bad:#ff9a70;"
    "--b0:#4aa8e8;--b1:#ff8a3d;--b2:#2fc79c;--b3:#e69ac4;--b4:#e6b422;--b5:#b79cf2"
)
STYLE = (
    f":root{{color-scheme:light dark;{LIGHT}}}"
    f"\n@media(prefers-color-scheme:dark){{:root{{{DARK}}}}}"
    + """
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.5 system-ui,"Segoe UI",Roboto,Inter,sans-serif}
main{max-width:72rem;margin:auto;padding:2.5rem 1.25rem}
h1,h2,.tiles strong{font-family:"Iowan Old Style",Palatino,"Palatino Linotype","Source Serif 4",Georgia,serif}
h1{font-size:2.4rem;line-height:1.15;margin:.1rem 0 .4rem;overflow-wrap:anywhere}
h2{font-size:1.4rem;margin:2.8rem 0 .6rem}
p{margin:.4rem 0}
.kicker,.tiles span{font-size:.78rem;letter-spacing:.04em;text-transform:uppercase;color:var(--soft)}
.soft,footer,caption{color:var(--soft);font-size:.88rem;overflow-wrap:anywhere}
section p.soft,footer p{max-width:52rem}
.tiles,.pair{display:grid;gap:1rem 1.5rem;grid-template-columns:repeat(auto-fit,minmax(min(100%,17rem),1fr))}
.tiles{margin-top:1.6rem}
.tiles div{background:var(--wash);border-radius:.5rem;padding:1rem 1.2rem}
.tiles span,.tiles strong{display:block}
.tiles strong{font-size:1.9rem;line-height:1.3}
.tiles p{font-size:.92rem}
.pair{grid-template-columns:repeat(auto-fit,minmax(min(100%,24rem),1fr))}
figure{margin:.4rem 0;min-width:0}
figcaption{font-weight:600}
caption{text-align:left;padding-bottom:.3rem}
svg{display:block;width:100%;height:auto;overflow:visible;stroke-linejoin:round}
figure svg{min-width:25rem}
.tip{transition:opacity .15s}
.key{display:flex;flex-wrap:wrap;gap:.1rem 1.1rem;font-size:.88rem}
.key i{font-style:normal;margin-right:.35em}
.key svg{display:inline-block;width:1.5rem;margin-right:.35em;vertical-align:middle}
.dot{display:inline-block;width:.65em;height:.65em;border-radius:50%;background:var(--ink);margin-right:.45em}
.scroll{overflow-x:auto}
.scroll:focus-visible{outline:2px solid var(--b0);outline-offset:2px}
table{border-collapse:collapse;width:100%;font-size:.86rem;font-variant-numeric:tabular-nums}
th,td{padding:.38rem .55rem;text-align:right;vertical-align:top;white-space:nowrap;font-weight:400}
thead th{color:var(--soft);vertical-align:bottom;white-space:normal;line-height:1.25;max-width:7.5rem}
thead tr:last-child th{border-bottom:1px solid var(--ink)}
tbody tr+tr>*{border-top:1px solid var(--grid)}
tbody tr:hover{background:var(--wash)}
tbody th{font-weight:600}
tbody th,.text2 :is(th,td):nth-child(-n+2),.text3 :is(th,td):nth-child(-n+3),.words :is(th,td){text-align:left}
.words td{white-space:normal;min-width:8rem;overflow-wrap:anywhere}
thead th.group.group.group{text-align:center;color:var(--ink);font-weight:600;border-bottom:1px solid var(--grid)}
td small{display:block;color:var(--soft);line-height:1.2}
td small b{color:var(--ink)}
tbody .sum.sum>*{border-top:1px solid var(--ink)}
td.wrap{white-space:normal;min-width:6rem}
.bad{color:var(--bad);overflow-wrap:anywhere}
.times{max-width:44rem}
.times .bars{width:60%}
.bar{height:.8em;margin-top:.35em;background:var(--b0);border-radius:.15em}
footer{margin-top:3rem;padding-top:.8rem;border-top:1px solid var(--grid)}
:is(.dots,.bars,.lines) text{font-size:12px;fill:currentColor}
.dots circle,.bars .block{fill:var(--b0)}
:is(.dots,.lines) .grid{stroke:var(--grid)}
.lines :is(polyline,line){fill:none;stroke-width:2}
.lines .grid{stroke-width:1}
.bars .client{fill:var(--b5)}
:is(.dots,.bars) :is(.axis,.spread){stroke:var(--ink)}
.bars .line{stroke:var(--b1);stroke-dasharray:5 3}
@media(max-width:40rem){main{padding:1.4rem .9rem}h1{font-size:1.9rem}
.scroll tbody th,.scroll thead tr:last-child th:first-child{position:sticky;left:0;background:var(--paper)}}
"""
    + f"@page{{size:A4 landscape;margin:12mm}}\n@media print{{:root{{color-scheme:light;{LIGHT}}}"
    + """
*{print-color-adjust:exact;-webkit-print-color-adjust:exact}
main{max-width:none;padding:0}
.scroll{overflow:visible}
figure svg{min-width:0!important;max-width:100%!important}
table{font-size:.68rem}
th,td,td.wrap,.words td{white-space:normal;overflow-wrap:anywhere;min-width:0;padding:.2rem .3rem}
.scroll :is(tbody th,thead tr:last-child th:first-child){position:static}
thead{display:table-header-group}
tr,figure,.tiles div{break-inside:avoid}
h2,caption,figcaption{break-after:avoid}
.pair{grid-template-columns:1fr 1fr}}
"""
)
