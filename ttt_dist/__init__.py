"""The model: TTT operations, the TTT layer and Moshi with TTT inside. No mesh, no process group."""
