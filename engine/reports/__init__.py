"""What is shown of a comparison: sums of it, pictures, and a page that holds all of it."""

from mergemill.engine.reports.charts import check_drawing
from mergemill.engine.reports.page import make_page, name_sides, say_number, say_share
from mergemill.engine.reports.routing import make_routing_page
from mergemill.engine.reports.sums import GroupChange, group_by_kind, list_most_changed, sum_up

__all__ = [
    "GroupChange",
    "check_drawing",
    "group_by_kind",
    "list_most_changed",
    "make_page",
    "make_routing_page",
    "name_sides",
    "say_number",
    "say_share",
    "sum_up",
]
