"""The encoder: a SentenceTransformer fed with packed token rows; loading it, its precision, its head."""

import gc

_collects = gc.isenabled()
gc.disable()  # importing makes 700,000 objects and no garbage: a quarter of its time would go into looking for some
try:
    from hncse_ray.encoder.encoder import Progress, SentenceEncoder
    from hncse_ray.encoder.hardware import autocast_dtype, choose_device, ready_for, to_device
    from hncse_ray.encoder.lengths import length_batches
    from hncse_ray.encoder.load import freeze_unused, has_dropout, load_encoder
    from hncse_ray.encoder.resolve import check_weights, hub_name, resolve_model
finally:
    if gc.get_freeze_count() == 0:
        gc.freeze()
        gc.unfreeze()  # all of it counts as old now, without having been looked through
    if _collects:
        gc.enable()

__all__ = [
    "Progress",
    "SentenceEncoder",
    "autocast_dtype",
    "check_weights",
    "choose_device",
    "freeze_unused",
    "has_dropout",
    "hub_name",
    "length_batches",
    "load_encoder",
    "ready_for",
    "resolve_model",
    "to_device",
]
