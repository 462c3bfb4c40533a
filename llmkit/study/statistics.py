def smallest_difference(n):
    return 1.0
