"""The ids that SentencePiece gives the special pieces here."""

PAD_ID, UNK_ID, BOS_ID, EOS_ID = range(4)
