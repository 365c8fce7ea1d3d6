"""Sources that are recordings: folders of speakers, lists, and Kaldi's wav.scp."""
