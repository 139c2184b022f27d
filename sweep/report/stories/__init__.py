"""Studies that answer their question themselves, by name."""

from collections.abc import Mapping

from sweep.report import thread
from sweep.report.stories import bloat, dirty_log, hugetlb_boot, scaling, snapshot, thp_or_not
from sweep.report.story import Story

STORIES: Mapping[str, Story] = {
    "thread": thread.STORY,
    **{module.NAME: module.STORY for module in (bloat, dirty_log, hugetlb_boot, scaling, snapshot, thp_or_not)},
}
