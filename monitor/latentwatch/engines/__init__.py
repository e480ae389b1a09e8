"""The serving engines that can be watched, one package each; all write into handover."""
