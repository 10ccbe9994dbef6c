# Hardware task switches (SDM vol. 3A 9.3): by JMP, by CALL and IRET, through a task gate.

    .set TASK_A, 0x30
    .set TASK_B, 0x38
    .set TASK_B_STACK, 0x6F00

    .code32
tasks:
    mov $TASK_A, %eax
    ltr %ax
    mov $0x5EED, %ebx
    ljmp $TASK_B, $0
    mov %ebx, %eax
    show32 "task a, back by jmp: its ebx is "
    call show_tasks
    lcall $TASK_B, $0
    call show_tasks
    pushfl
    pop %eax
    and $0x4000, %eax
    show32 "task a, back by iret: nested flag "
    int $0x44
    call show_tasks
    say32 "task a, back from the task gate\r\n"
    # Not available: it is the running task.
    movl $(1f - tour_begin + 0x8000), (resume32 - tour_begin + 0x8000)
    ljmp $TASK_A, $0
1:  mov %edx, %eax
    show32 "task switch to the busy task: #GP error "
    ret

# Task register and the access bytes of both descriptors: 89 available, 8b busy.
show_tasks:
    str %eax
    and $0xFFFF, %eax
    shl $8, %eax
    mov (gdt - tour_begin + 0x8000 + TASK_A + 5), %al
    shl $8, %eax
    mov (gdt - tour_begin + 0x8000 + TASK_B + 5), %al
    show32 "task register, access of a and of b: "
    ret

# Task B runs once for each switch to it. Its registers come from its TSS.
task_b:
    mov %eax, %ebx
    show32 "task b, by jmp: its eax is "
    call show_tasks
    mov %cr0, %eax
    and $8, %eax
    show32 "task b: cr0.ts is "
    clts
    ljmp $TASK_A, $0

    call show_nested
    iret

    call show_nested
    iret

show_nested:
    pushfl
    pop %eax
    and $0x4000, %eax
    shl $4, %eax
    mov (tss_b - tour_begin + 0x8000), %ax
    show32 "task b, nested: flag and link "
    call show_tasks
    ret
