# The explanation tables of the RESULTS.md, on the held-out images of the run of recipes/busi.args.
python explain.py --model runs/busi --evaluate --most 60
python explain.py --model runs/busi --hotspots --method ig
python explain.py --model runs/busbra --evaluate --most 40  # of recipes/busbra.args
