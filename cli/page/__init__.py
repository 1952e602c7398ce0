"""``mergemill ui``: a page to merge from, thin over the engine's face and the commands.

**Starlette, uvicorn and a little JavaScript of our own** (2026-11-29). What the page needs: runs that outlive tab and
page, one text with two views, completion and faults at their line in an editor, progress, no telemetry, and nothing
from another server. Installed here, each into an empty environment:

==================  ========  ======  ============================  ======
library             packages  size    resident after its import     import
==================  ========  ======  ============================  ======
Starlette, uvicorn         7    6 MB                        28 MiB   0.2 s
NiceGUI 3.18              49  105 MB                        64 MiB   0.8 s
Gradio 6.31               52  342 MB                       135 MiB   7.5 s
==================  ========  ======  ============================  ======

(Panel 1.9 would bring 31, pandas and Bokeh among them; it was not installed.) Gradio is what the Hub knows, but a Space
can be any container, and its code names servers for fonts and analytics. These three own the page: widgets belong to a
session in the page's process, where here all that counts lies beside the outputs, and none has an editor that marks
lines. htmx wants markup from the server for what are JSON values here, which tests read too.

One text, the YAML, is the recipe. The form is made of it by the server (`form.py`), and an edit of the form becomes a
new text, so that the two cannot be out of step. A run is a command of mergemill in its own process (`jobs.py`), known
by its output. Who may ask is decided in `gate.py`, what may be reached in `roots.py`.

Scripts ask again instead of being told (2026-11-29): a connection that is held open by each tab would need a watcher
of the disks in the page's process, and what it saves is small. A look at a run takes that process 6 ms, and one at an
output is kept for a second, or for fifty times what it took; tabs that nobody sees ask nothing.

Measured here on two shared cores (2026-11-29): first paint after 0.25 to 1.4 s, 72 MiB resident after plans of three
70B models, which take 0.7 s each. A merge of 6 s of processor time was watched for 0.16 s of the page's, 2.5 %, most of
which is what its start takes: for a longer one it is less.
"""
