"""Quality against bytes: every method on the same translation tasks.

    python -m benchmarks.translation prepare --task multi30k --data-dir DIR
    python -m benchmarks.translation run --task multi30k
    python -m benchmarks.translation files --task multi30k
    python -m benchmarks.translation report

Modules, from the data up:

- `task`: pre-tokenised sentence pairs, their batches, greedy search. From
  here on nothing needs TensorFlow: any backend of Keras runs it.
- `tables`: the rivals' tables as layers that can be trained.
- `grid`: the rows, in the order of their worth.
- `rows`: one row: its student is made, fine-tuned, and translates the test.
- `files`: LiteRT files of students that can be exported.
- `report`: BLEU, chrF, confidence intervals, tables and pictures.
"""
