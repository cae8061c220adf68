"""N-gram language models: estimated by modified Kneser-Ney smoothing, stored as ARPA, scored as a back-off automaton."""
