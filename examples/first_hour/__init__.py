"""foveal on real input, in one report: a photograph, a language model, and the speed on both."""
