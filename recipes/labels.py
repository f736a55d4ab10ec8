"""docs/labels.png: AUC against labels for a new hospital, from two runs of al_loop.py, see recipes/al-busbra.args.

python recipes/labels.py runs/al-busbra runs/al-busbra-cold docs/labels.png"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import plots

warm, cold = (json.loads((Path(folder) / "al.json").read_text()) for folder in sys.argv[1:3])
series = []
for style, (report, where) in enumerate([(warm, "BUSI's model"), (cold, "ImageNet")]):
    best = max((n for n in report["table"] if n != "random"), key=lambda n: report["table"][n]["area"])
    for name, dash in (("random", "#888888" if style else style), (best, style + 1)):
        points = [(p["mean"], p["low"], p["high"]) for p in report["auc"][name]]
        series.append(plots.Series(f"{where}, {name}", report["labels"], *zip(*points, strict=True), style=dash))
low, high = plots.data_range(s.y for s in series)
chart = plots.line_chart(
    series, "Labels of a new hospital", "labels", "test AUC", None, (low - 0.02, high + 0.02), "whole"
)
plots.save_png(
    plots.page([chart], 1, "BUS-BRA, last layers learnt, mean of 50 seeds with its 95 % t band"), Path(sys.argv[3])
)
