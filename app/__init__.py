"""Winnow, online: one request, a large catalogue, an answer inside the deadline.

     catalogue          ~2,000               ~500                    k
     ──────────▶ retrieval ──▶ pre-ranking ──▶ re-ranking ──▶ selection ──▶ answer
       1e3..1e8   user tower    linear model    deep ONNX model   value, top k
                  + FAISS       on features     S shards over     propensities
                                                W workers

To change                                   open
  the order, the budgets, the fallbacks       funnel.py
  what flows between the stages               flow.py
  one stage                                   stages/
  how shards reach processes                  workers/
  a feature                                   features.py
  what a manifest says, files verified        manifest.py
  what a bundle holds, what is refused        bundle.py, binding.py
  items that come and go while it serves      live.py
  what is known of a person                   users.py
  the wire: fields, limits                    wire.py
  routes, statuses, keys                      api.py, keys.py
  a rule on time, on what replaces what, on
  what that loses                             control/
  a metric, a log field                       metrics.py, log.py
  a tunable                                   settings.py
"""

import os

# onnxruntime's builds tell their maker what models they run, from a thread in every process, unless told not to before
# they are imported; and all that imports them here imports this first.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
