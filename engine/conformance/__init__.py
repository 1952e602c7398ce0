"""The suite that every merge method is put through, also your own: plain claims about what it computes and how.

>>> from mergemill.engine.conformance import check_method  # doctest: +SKIP
>>> check_method(my_method, models=2, settings={"weight": (0.7, 0.3)}, oracle=expect_my_method)  # doctest: +SKIP
"""

from mergemill.engine.conformance.check import check_method, list_claims
from mergemill.engine.conformance.claim import Claim
from mergemill.engine.conformance.mill import Mill, Settings, Task
from mergemill.engine.conformance.subject import Based, Expected, Subject

__all__ = [
    "Based",
    "Claim",
    "Expected",
    "Mill",
    "Settings",
    "Subject",
    "Task",
    "check_method",
    "list_claims",
]
