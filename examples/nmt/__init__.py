"""A small Transformer translator, and what compressing its table costs it.

Modules, from the data up:

- `cldr`: an English-German corpus generated from Unicode CLDR data.
- `tokens`: the ids of the special pieces.
- `data`: corpora, the SentencePiece vocabulary, length-bucketed batches.
- `model`: the Transformer, one table for source, target and output.
- `train`: the teacher's training and the student's distillation.
- `translate`: greedy and beam search, with Keras and with LiteRT.
- `evaluate`: sacreBLEU, the table of results, the pictures.
- `pipeline`: the stages in order, each resumable; `python -m examples.nmt`.
"""
