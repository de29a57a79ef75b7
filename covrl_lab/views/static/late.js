// anywidget gives a model two seconds to load, and drops what the kernel tells one that came later, as on a busy machine.
// Such a model takes its messages itself, and asks for its state once more.

async function catchUp(model) {
  const own = await model.widget_manager?.get_model(model.get("own_id"));
  if (!own?.comm) return; // no kernel
  try {
    await own._handle_comm_msg({ content: { data: {} } }); // tells nothing; refused where the model came late
  } catch {
    const inherited = Object.getPrototypeOf(Object.getPrototypeOf(own))._handle_comm_msg;
    own.comm.on_msg(inherited.bind(own));
    model.send({ late: true });
  }
}

// Not awaited: the model is there when this function has returned.
function initialize({ model }) {
  catchUp(model);
}
