"""The frame of our pages: one file of HTML, light and dark, wide and narrow, without script or network."""

from collections.abc import Sequence
from html import escape

_STYLE = """
:root {{ color-scheme: light dark; --line: color-mix(in srgb, currentColor 18%, transparent); }}
body {{ font: 15px/1.45 system-ui, sans-serif; margin: 0 auto; max-width: 1180px; padding: 1rem;
  overflow-wrap: anywhere; }}
h1 {{ font-size: 1.35rem; }} h2 {{ font-size: 1.1rem; margin: 2rem 0 .5rem; }}
.pictures {{ display: flex; flex-wrap: wrap; gap: 1rem; }}
figure {{ margin: 0; padding: .75rem; border: 1px solid var(--line); border-radius: .5rem; box-sizing: border-box;
  flex: 0 1 {figure_px}px; max-width: 100%; }}
figcaption {{ margin-bottom: .5rem; font-size: .85rem; }}
svg {{ width: 100%; height: auto; display: block; min-width: 300px; }}
.wide {{ overflow-x: auto; }} table {{ border-collapse: collapse; font-size: .85rem; }}
th, td {{ text-align: right; padding: .2rem .6rem; border-bottom: 1px solid var(--line); white-space: nowrap; }}
{style}
""".strip()


def frame(title: str, body: Sequence[str], *, figure_px: int, style: str = "") -> str:
    """Return a page of the lines of `body`. figure_px: the width of a picture's frame; style: more of CSS."""
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
            f"<title>{escape(title)}</title><style>{_STYLE.format(figure_px=figure_px, style=style)}</style></head>",
            "<body>",
            *body,
            "</body></html>",
            "",
        ]
    )
