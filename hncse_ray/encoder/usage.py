"""The text that shows how to use a saved encoder."""

from __future__ import annotations

from hncse_ray.encoder.encoder import SentenceEncoder


def model_readme(encoder: SentenceEncoder) -> str:
    """Return the text of README.md for an encoder of which no more is known than itself."""
    return f"""---
library_name: sentence-transformers
pipeline_tag: sentence-similarity
---

# Sentence encoder trained with hncse_ray

{usage(encoder)}"""


def usage(encoder: SentenceEncoder) -> str:
    """Return how to use a saved encoder: with sentence-transformers, plain transformers and hncse_ray."""
    pool = {
        "mean": "states = output.last_hidden_state\n{mean}",
        "first_last_mean": "states = (output.hidden_states[0] + output.hidden_states[-1]) / 2\n{mean}",
        "last_two_mean": "states = (output.hidden_states[-1] + output.hidden_states[-2]) / 2\n{mean}",
    }.get(encoder.pooling, "vectors = output.last_hidden_state[:, 0]")
    mean = "mask = batch['attention_mask'].unsqueeze(-1)\nvectors = (states * mask).sum(1) / mask.sum(1)"
    head, imports = "", ""
    if encoder.head is not None and not encoder.head_in_training_only:
        imports = "\nfrom safetensors.torch import load_file"
        head = (
            "\nhead = load_file('PATH/2_Dense/model.safetensors')"
            "\nvectors = torch.tanh(vectors @ head['linear.weight'].T + head['linear.bias'])"
        )
    return f"""{encoder.dimension} dimensions, {encoder.pooling} pooling, unit norm, up to {encoder.max_length} tokens.
`PATH` is the model's folder or its name on the hub.

```python
from sentence_transformers import SentenceTransformer

vectors = SentenceTransformer("PATH").encode(["A sentence.", "Another one."])
```

The same with transformers alone:

```python
import torch
from transformers import AutoModel, AutoTokenizer{imports}

tokenizer, model = AutoTokenizer.from_pretrained("PATH"), AutoModel.from_pretrained("PATH").eval()
batch = tokenizer(["A sentence.", "Another one."], padding=True, truncation=True,
                  max_length={encoder.max_length}, return_tensors="pt")
with torch.no_grad():
    output = model(**batch)
{pool.format(mean=mean)}{head}
vectors = torch.nn.functional.normalize(vectors, dim=-1)
```

And with hncse_ray:

```python
import hncse_ray

vectors = hncse_ray.load_encoder("PATH").encode(["A sentence.", "Another one."])
```
"""
