//! What is counted, and what time it took.

use trapgate_engine::{Exit, NoDevices, Observe, Vcpu};
use trapgate_interp::Interpreter;
use trapgate_jit::Translating;
use trapgate_x86::CpuProfile;
use trapgate_x86::profile::Level;

use crate::guest::{CODE, Random, fill, memory, run, state};

/// A loop with a jump out of the middle of a unit, and an instruction that is called out for.
#[test]
fn whoever_observes_costs_gets_every_instruction_counted() {
    let code = [
        0xb9, 0xe8, 0x03, 0x00, 0x00, // mov ecx, 1000
        0xf6, 0xc1, 0x01, // test cl, 1
        0x74, 0x02, // jz over the next
        0xff, 0xc0, // inc eax
        0xff, 0xc9, // dec ecx
        0x75, 0xf5, // jnz to the test
        0x0f, 0xa2, // cpuid
        0xf4, // hlt
    ];
    let profile = CpuProfile::new(Level::V3, 1_000_000_000);
    let observe = Observe {
        costs: true,
        perf_map: false,
    };
    let (left, right) = (memory(), memory());
    for memory in [&left, &right] {
        fill(memory, &mut Random(1));
        memory.write(CODE, &code).expect("code lies in memory");
    }
    let mut interp = Interpreter::new(left, Box::new(NoDevices), profile.clone(), 0, 1);
    let mut jit = Translating::observed(right, Box::new(NoDevices), profile, 0, 1, observe)
        .expect("the host can run translated code");
    let start = state(&mut Random(1));

    let ends = [run(&mut interp, &start), run(&mut jit, &start)];

    assert_eq!(ends[0].0, Exit::Halted);
    assert_eq!(ends[0].1.gpr, ends[1].1.gpr);
    assert_eq!(interp.instructions(), 1 + 1000 * 4 + 500 + 2);
    assert_eq!(jit.instructions(), interp.instructions());

    let costs = jit.costs().expect("it knows them").costs();
    let cost = |kind: &str, detail: &str| {
        let found = costs
            .iter()
            .find(|cost| cost.kind == kind && cost.detail == detail);
        found.unwrap_or_else(|| panic!("{kind} {detail} in {costs:?}"))
    };
    assert_eq!(cost("call_out", "cpuid").count, 1);
    assert!(cost("translated_code", "").nanoseconds > Some(0));
    let counters = jit.counters();
    let counter = |name: &str| {
        let found = counters.iter().find(|counter| counter.name() == name);
        found.map(|counter| counter.get())
    };
    assert_eq!(counter("translations"), Some(cost("translation", "").count));
    assert!(counter("direct_exits_linked") > Some(0));
}

#[test]
fn nobody_who_does_not_ask_pays_for_time() {
    let profile = CpuProfile::new(Level::V3, 1_000_000_000);
    let memory = memory();
    fill(&memory, &mut Random(1));
    memory
        .write(CODE, &[0x0f, 0xa2, 0xf4])
        .expect("code lies in memory");
    let mut jit = Translating::new(memory, Box::new(NoDevices), profile, 0, 1)
        .expect("the host can run translated code");
    run(&mut jit, &state(&mut Random(1)));
    let costs = jit.costs().expect("it knows them").costs();
    assert!(costs.iter().any(|cost| cost.detail == "cpuid"));
    assert!(costs.iter().all(|cost| cost.nanoseconds.is_none()));
}
