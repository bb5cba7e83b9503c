"""Building blocks of every tower and decoder.

Axis letters, as suffixes of arrays and in einsum strings, throughout the package:

    B batch rows      T query tokens    S key tokens      D model width     H query heads   K key/value heads
    G heads a group   C head dim        F hidden width    V vocabulary      L layers        P patches or tokens a tile
    I images, tiles   M memory slots    R rotary pairs, C/2; also LoRA rank            A adapters; also axes
    S also pixels of a tile side        c colour channels
"""
