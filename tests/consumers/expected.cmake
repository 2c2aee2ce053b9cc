# What examples/consumer prints. The same formula in torch gives 0.02736937787524836, and
# 0.072836, 0.065727, 0.059243 for the second answer.
expect("${output}" "loss 0.0273694")
expect("${output}" "7.2836  6.5727  5.9243")
