"""``mergemill ui``: a page to merge from, thin over the engine's face and the commands.

**Starlette, uvicorn and a little JavaScript of our own** (2026-11-29). What the page needs: runs that outlive tab and
page, one text with two views, completion and faults at their line in an editor, progress by polling, no telemetry, and
nothing from another server. Installed into empty environments here (packages; size beside pip's own 13 MB; resident
set after the import):

=====================  ========  =======  =======
Starlette + uvicorn           9    18 MB   28 MiB
NiceGUI 3.18                 51   117 MB   64 MiB
Panel 1.9                    31   pandas, Bokeh and pyviz_comms beside Tornado
Gradio 6.31                  54   354 MB  135 MiB
=====================  ========  =======  =======

Gradio is what the Hub knows, but a Space can be any container. Its queue ties a run to a browser's session, it takes a
fifth of a minute to import, brings pandas, and asks fonts and analytics of others unless told not to. NiceGUI and Panel
keep each tab's widgets in the page's process behind a WebSocket, so a restart of the page empties all tabs; neither has
an editor that marks lines. htmx would have saved some fifty lines of `static/`, and needs markup made on the server for
what are JSON values here that tests read too.

One text, the YAML, is the recipe. The form is made of it by the server (`form.py`), and an edit of the form becomes a
new text, so that the two cannot be out of step. A run is a command of mergemill in its own process (`jobs.py`), known
by its output. Who may ask is decided in `gate.py`, what may be reached in `roots.py`.
"""
