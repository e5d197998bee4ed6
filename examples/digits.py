"""Three linear layers learn handwritten digits on a local network of two PNodes; prints the accuracy on digits not seen.

Needs scikit-learn for the pictures: ``pip install scikit-learn``, then ``python examples/digits.py``.
"""

from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits

import dcnr


def main() -> None:
    pictures = load_digits()
    x, y = (pictures.data / 16).astype(np.float32), pictures.target.astype(np.int64)
    order = np.random.default_rng(0).permutation(len(x))
    seen, unseen = order[:1400], order[1400:]
    model = dcnr.load(Path(__file__).with_name("digits.yaml"))
    print(model.summary())
    with dcnr.local(pnodes=2) as net:
        run = net.train(
            model,
            data={"x": x[seen], "y": y[seen]},
            steps=600,
            batch_size=64,
            microbatches=2,
            optimizer=dcnr.AdamW(lr=1e-2),
            schedule=dcnr.Cosine(warmup=20),
        )
        for event in run:
            if isinstance(event, dcnr.StepDone) and event.step % 100 == 0:
                print(f"step {event.step}: loss {event.loss:.3f}")
        logits = net.forward(model, {"x": x[unseen]})["prediction"]
    right = int((logits.argmax(axis=1) == y[unseen]).sum())
    print(f"accuracy on {len(unseen)} digits not seen: {100 * right / len(unseen):.1f} %")


if __name__ == "__main__":
    main()
