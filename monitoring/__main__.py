"""python -m monitoring: write the dashboards."""

from monitoring import models, on_call
from monitoring.panels import FOLDER, as_json

for dashboard in (on_call.DASHBOARD, models.DASHBOARD):
    (FOLDER / f"{dashboard['uid']}.json").write_text(as_json(dashboard), encoding="utf-8")
